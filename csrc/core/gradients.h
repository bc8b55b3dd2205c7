// What is parallel over time: the gradients of weights and input, as products over all steps, and of vectors, as sums.
#pragma once
#include "backward.h"

namespace ISA {

constexpr long gradient_rows = 96;  // so many rows of a weight's gradient, or of the input's, are one task

template <class T> struct Gradients {
  const FestinaCall& call;
  const Shape& s;
  const BackwardBuffers<T>* b;      // [directions]
  T* const (*collected)[2];         // [threads, directions]: d_vectors of each
  Blocked<T> input;                 // N rows
  const Scratch<T>& my;
  Blocked<T> d_rows;                // of this thread: a few rows of d_input
  long workers;

  // Smaller tasks where there would be too few to go round.
  long task_rows(long rows) const {
    return min(gradient_rows, max(TILE_ROWS, rows / (4 * workers) / TILE_ROWS * TILE_ROWS));
  }
  long weight_rows() const { return task_rows(s.traits.gates * s.H); }
  long input_rows() const { return task_rows(s.N); }

  // Every task by its number; false past the last.
  bool first_pass(long task) const {
    for (long d = 0; d < s.directions; ++d) {
      for (int w = 0; w < 3; ++w) {
        Factors f = factors_of(s, call, d, w);
        long count = f.wanted ? ceil_div(f.rows, weight_rows()) : 0;
        if (task < count) return sum_weight(d, w, f, task * weight_rows()), true;
        task -= count;
      }
      if (task == 0) return sum_vectors(d), true;
      task -= 1;
    }
    if (!call.d_input || task >= ceil_div(s.N, input_rows())) return false;
    return sum_input(task * input_rows()), true;
  }

  // What needs whole columns of a weight's gradient.
  bool second_pass(long task) const {
    for (long d = 0; d < s.directions; ++d)
      for (int w = 0; w < 3; ++w) {
        Factors f = factors_of(s, call, d, w);
        bool is_needed = f.wanted && (f.is_centred || b[d].d_weight[w]);
        long count = is_needed ? ceil_div(f.columns, finish_columns) : 0;
        if (task < count) return finish_weight(d, w, f, task * finish_columns), true;
        task -= count;
      }
    return false;
  }

  static constexpr long finish_columns = 64;

  struct Sum {
    T* data;
    long step;
  };
  Sum place_of(long d, int w, const Factors& f) const {
    if (T* own = b[d].d_weight[w]) return {own, ceil_div(f.columns, chunk<T>) * chunk<T>};
    return {(T*)f.wanted, f.columns};
  }

  void sum_weight(long d, int w, const Factors& f, long row) const {
    long count = min(weight_rows(), f.rows - row), H = w == 2 ? s.P : s.H, gates = f.rows / H;
    Blocked<T> left = w == 0 ? b[d].d_v[0] : w == 1 ? b[d].d_v[s.traits.sides - 1] : b[d].d_h_projected;
    Blocked<T> right = w == 0 ? input : w == 1 ? b[d].h_old : b[d].unprojected;
    Sum to = place_of(d, w, f);
    for (long i = 0; i < count; ++i) {
      long gate = (row + i) / H, j = (row + i) % H;
      my.left_at[i] = (j / chunk<T> * gates + gate) * left.step() + j % chunk<T>;
      my.target_at[i] = (row + i) * to.step;
    }
    constexpr int C = chunk<T>;
    for (long token = 0; token == 0 || token < s.N; token += depth_block)
      multiply<T, C>({left.data + token * C, my.left_at, C * C}, count, {right.data + token * C, right.step()},
                     ceil_div(f.columns, C), min(depth_block, s.N - token), {to.data, my.target_at, C}, token > 0);
  }

  void finish_weight(long d, int w, const Factors& f, long column) const {
    Sum from = place_of(d, w, f);
    Tensor<T> to(f.wanted, call.type);
    long count = min(finish_columns, f.columns - column);
    for (int group = 0; group < (w == 2 ? 1 : s.groups); ++group) {
      auto each_row = [&](auto body) {
        for (long row = 0; row < f.rows; ++row)
          if (w == 2 || s.group_of[row / s.H] == group) body(row, from.data + row * from.step + column);
      };
      T mean[finish_columns] = {};
      if (f.is_centred) {
        each_row([&](long, const T* x) {
          for (long k = 0; k < count; ++k) mean[k] += x[k];
        });
        for (long k = 0; k < count; ++k) mean[k] /= (T)s.group_size[group];
      }
      each_row([&](long row, T* x) {
        if (!b[d].d_weight[w])
          for (long k = 0; k < count; ++k) x[k] -= mean[k];
        else
          for (long k = 0; k < count; ++k) to.put(row * f.columns + column + k, x[k] - mean[k]);
      });
    }
  }

  void sum_input(long token) const {
    long count = min(input_rows(), s.N - token), depth = s.columns() * chunk<T>;
    for (long d = 0; d < s.directions; ++d) {
      const Blocked<T>& left = b[d].d_v[0];
      multiply<T>({left.at(0, token), my.chunk_at, left.step()}, count, {b[d].input, depth * chunk<T>}, s.inputs, depth,
                  {d_rows.data, my.chunk_at, d_rows.step()}, d > 0);
    }
    Tensor<T> to(call.d_input, call.type);
    for (long r = 0; r < count; ++r) to.write((token + r) * s.I, s.I, 0, s.inputs, d_rows, r);
  }

  // Sums over threads of the vectors that `which` gives for each gate.
  template <class Which> void write_vector(void* wanted, long d, long gates, Which which) const {
    if (!wanted) return;
    Tensor<T> to(wanted, call.type);
    for (long g = 0; g < gates; ++g)
      for (long j = 0; j < s.H; ++j) {
        T total = 0;
        for (long worker = 0; worker < s.threads; ++worker) total += vector_at(collected[worker][d], which(g), j);
        to.put(g * s.H + j, total);
      }
  }

  void sum_vectors(long d) const {
    void* const* to = call.d_parameters[d];
    int gates = s.traits.gates;
    auto gain = [](int side) { return [side](int g) { return gain_of(side, g); }; };
    auto shift_x = [](int g) { return shift_of(0, g); };
    // Both sides take the same gradient, save the last gate of a parted cell.
    auto shift_h = [&](int g) { return shift_of(s.traits.is_parted && g == gates - 1, g); };
    write_vector(to[FESTINA_BIAS_IH], d, gates, shift_x);
    write_vector(to[FESTINA_BIAS], d, gates, shift_x);
    write_vector(to[FESTINA_BIAS_HH], d, gates, shift_h);
    write_vector(to[FESTINA_GAIN_IH], d, gates, gain(0));
    write_vector(to[FESTINA_GAIN], d, gates, gain(0));
    write_vector(to[FESTINA_GAIN_HH], d, gates, gain(1));
    write_vector(to[FESTINA_GAIN_C], d, 1, [](int) { return gain_c; });
    write_vector(to[FESTINA_BIAS_C], d, 1, [](int) { return shift_c; });
    if (s.traits.is_diagonal) write_vector(to[FESTINA_WEIGHT_HH], d, 1, [](int) { return diagonal; });
    if (to[FESTINA_BIAS_INNER]) sum_inner(d, Tensor<T>(to[FESTINA_BIAS_INNER], call.type));
  }

  void sum_inner(long d, Tensor<T> to) const {
    T means[max_gates] = {}, *inner = b[d].d_inner;
    for (long n = 0; n < s.columns(); ++n)
      for (int l = 0; l < chunk<T>; l += lanes<T>) {
        Vec<T> total = broadcast(T(0));
        for (long token = 0; token < s.N; ++token) total += load(b[d].d_v[0].at(n, token) + l);
        store(inner + n * chunk<T> + l, total);
      }
    auto at = [&](long g, long j) { return inner[(j / chunk<T> * s.traits.gates + g) * chunk<T> + j % chunk<T>]; };
    for (long g = 0; s.is_centred && g < s.traits.gates; ++g)
      for (long j = 0; j < s.H; ++j) means[s.group_of[g]] += at(g, j) / (T)s.group_size[s.group_of[g]];
    for (long g = 0; g < s.traits.gates; ++g)
      for (long j = 0; j < s.H; ++j) to.put(g * s.H + j, at(g, j) - means[s.group_of[g]]);
  }
};

}  // namespace ISA
