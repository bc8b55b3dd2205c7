// The gradients of weights and input, as products over the rows of a stretch, and of vectors, as sums.
#pragma once
#include "backward.h"

namespace ISA {

template <class T> struct Gradients {
  const FestinaCall& call;
  const Shape& s;
  const BackwardBuffers<T>* b;      // [directions]
  const Stretch* stretches;         // [directions, threads]
  T* const (*collected)[2];         // [threads, directions]: d_vectors of each
  const Scratch<T>& my;
  Blocked<T> d_rows;                // of this thread: a few rows of d_input
  long workers, groups;
  long direction, end_direction;    // those that have just gone back over a stretch
  bool is_first;                    // nothing has been summed yet

  const Stretch& stretch(long d, long group) const { return stretches[d * s.threads + group]; }

  // Whether steps are left to go back over.
  bool goes_on() const {
    for (long d = direction; d < end_direction; ++d)
      for (long group = 0; group < groups; ++group)
        if (stretch(d, group).steps_left > 0) return true;
    return false;
  }

  // Every task by its number; false past the last. The large ones come first.
  bool sum_stretch(long task) const {
    if (is_input(direction, task)) return true;
    for (long d = direction; d < end_direction; ++d) {
      for (int w = 0; w < 3; ++w) {
        Factors f = factors_of(s, call, d, w);
        long most = min(gradient_rows, max(TILE_ROWS, f.rows / (4 * workers) / TILE_ROWS * TILE_ROWS));
        long count = f.wanted ? ceil_div(f.rows, most) : 0;
        if (task < count) return sum_weight(d, w, f, task * most, min(most, f.rows - task * most)), true;
        task -= count;
      }
      if (!s.is_paired && call.d_parameters[d][FESTINA_BIAS_INNER] && task-- == 0) {
        for (long n = 0; n < s.columns(); ++n) sum_inner(d, n);
        return true;
      }
    }
    return false;
  }

  // Both factors of the weights' gradients as pairs of slots, in place, once what needs them as they are has had them.
  bool pair(long task) const {
    if constexpr (can_pair<T>) {
      for (long d = direction; d < end_direction; ++d) {
        const BackwardBuffers<T>& from = b[d];
        const Blocked<T> factors[] = {from.d_v[0], from.d_v[1], from.x, from.h_old};
        const long chunks[] = {s.columns(), s.traits.sides == 2 ? s.columns() : 0, s.inputs, s.traits.is_diagonal ? 0 : s.width};
        for (int i = 0; i < 4; ++i) {
          if (task >= chunks[i]) {
            task -= chunks[i];
            continue;
          }
          if (i == 0 && call.d_parameters[d][FESTINA_BIAS_INNER]) sum_inner(d, task);
          for (long group = 0; group < groups; ++group)
            pair_rows(factors[i].at(task, stretch(d, group).slot), stretch(d, group).rows);
          return true;
        }
      }
    }
    return false;
  }

  // Both directions add to the same rows of the input's gradient, so they take turns.
  bool is_turn_needed() const { return call.d_input && end_direction - direction == 2; }
  bool sum_turn(long task) const { return is_input(direction + 1, task); }

  bool is_input(long d, long& task) const {
    for (long group = 0; call.d_input && group < groups; ++group) {
      long rows = stretch(d, group).rows, count = min(rows, max(ceil_div(rows, gradient_rows), ceil_div(workers, groups)));
      if (task < count) return sum_input(d, stretch(d, group).slot, rows * task / count, rows * (task + 1) / count), true;
      task -= count;
    }
    return false;
  }

  // What needs whole columns of a weight's gradient, and what all threads have collected.
  bool finish(long task) const {
    for (long d = 0; d < s.directions; ++d) {
      for (int w = 0; w < 3; ++w) {
        Factors f = factors_of(s, call, d, w);
        bool is_needed = f.wanted && (f.is_centred || b[d].d_weight[w]);
        long count = is_needed ? ceil_div(f.columns, finish_columns) : 0;
        if (task < count) return finish_weight(d, w, f, task * finish_columns), true;
        task -= count;
      }
      if (task-- == 0) return finish_vectors(d), true;
    }
    return false;
  }

  static constexpr long finish_columns = 64;

  struct Place {
    T* data;
    long step;
  };
  Place place_of(long d, int w, const Factors& f) const {
    if (T* own = b[d].d_weight[w]) return {own, ceil_div(f.columns, chunk<T>) * chunk<T>};
    return {(T*)f.wanted, f.columns};
  }

  void sum_weight(long d, int w, const Factors& f, long row, long count) const {
    constexpr int C = chunk<T>;
    long H = w == 2 ? s.P : s.H, gates = f.rows / H;
    Blocked<T> left = w == 0 ? b[d].d_v[0] : w == 1 ? b[d].d_v[s.traits.sides - 1] : b[d].d_h_projected;
    Blocked<T> right = w == 0 ? b[d].x : w == 1 ? b[d].h_old : b[d].unprojected;
    Place to = place_of(d, w, f);
    for (long i = 0; i < count; ++i) {
      long gate = (row + i) / H, j = (row + i) % H;
      my.left_at[i] = (j / C * gates + gate) * left.step() + j % C;
      my.target_at[i] = (row + i) * to.step;
    }
    bool is_paired = s.is_paired && w < 2;
    with_factor<T>(is_paired, Two{}, T{}, [&](auto e) {
      using E = decltype(e);
      for (long group = 0; group < groups; ++group) {
        const Stretch& over = stretch(d, group);
        multiply<E, C>({(const E*)left.data + over.slot * C, my.left_at, C * C}, count,
                       {(const E*)right.data + over.slot * C, right.step()}, ceil_div(f.columns, C),
                       is_paired ? s.depth(over.rows) : over.rows, {to.data, my.target_at, C}, !is_first || group > 0);
      }
    });
  }

  void finish_weight(long d, int w, const Factors& f, long column) const {
    Place from = place_of(d, w, f);
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

  void sum_input(long d, long slot, long row, long end) const {
    long depth = s.depth(s.columns() * chunk<T>);
    with_factor<T>(s.is_paired, b[d].pairs[0], b[d].d_v[0], [&](auto left) {
      using E = typename decltype(left)::Element;
      multiply<E>({left.at(0, slot + row), my.chunk_at, left.step()}, end - row, {(const E*)b[d].input, depth * chunk<E>},
                  s.inputs, depth, {d_rows.data, my.chunk_at, d_rows.step()}, false);
    });
    Tensor<T> to(call.d_input, call.type);
    for (long r = row; r < end; ++r)
      to.write(b[d].token_of[slot + r] * s.I, s.I, 0, s.inputs, d_rows, r - row, s.directions == 2);
  }

  void sum_inner(long d, long n) const {
    for (int l = 0; l < chunk<T>; l += lanes<T>) {
      T* to = b[d].d_inner + n * chunk<T> + l;
      Vec<T> total = is_first ? broadcast(T(0)) : load(to);
      for (long group = 0; group < groups; ++group)
        for (long r = 0; r < stretch(d, group).rows; ++r) total += load(b[d].d_v[0].at(n, stretch(d, group).slot + r) + l);
      store(to, total);
    }
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

  void finish_vectors(long d) const {
    void* const* to = call.d_parameters[d];
    int gates = s.traits.gates;
    auto gain = [](int side) { return [side](int g) { return gain_of(side, g); }; };
    auto shift_x = [](int g) { return shift_of(0, g); };
    // Both sides take the same gradient, save the last gate of a parted cell.
    auto shift_h = [&](int g) { return shift_of(s.traits.is_parted && g == gates - 1, g); };
    write_vector(to[FESTINA_BIAS_IH], d, gates, shift_x);
    write_vector(to[FESTINA_BIAS_JOINT], d, gates, shift_x);
    write_vector(to[FESTINA_BIAS_HH], d, gates, shift_h);
    write_vector(to[FESTINA_GAIN_IH], d, gates, gain(0));
    write_vector(to[FESTINA_GAIN_JOINT], d, gates, gain(0));
    write_vector(to[FESTINA_GAIN_HH], d, gates, gain(1));
    write_vector(to[FESTINA_GAIN_C], d, 1, [](int) { return gain_c; });
    write_vector(to[FESTINA_BIAS_C], d, 1, [](int) { return shift_c; });
    if (s.traits.is_diagonal) write_vector(to[FESTINA_WEIGHT_HH], d, 1, [](int) { return diagonal; });
    if (to[FESTINA_BIAS_INNER]) finish_inner(d, Tensor<T>(to[FESTINA_BIAS_INNER], call.type));
  }

  void finish_inner(long d, Tensor<T> to) const {
    T means[max_gates] = {}, *inner = b[d].d_inner;
    auto at = [&](long g, long j) { return inner[(j / chunk<T> * s.traits.gates + g) * chunk<T> + j % chunk<T>]; };
    for (long g = 0; s.is_centred && g < s.traits.gates; ++g)
      for (long j = 0; j < s.H; ++j) means[s.group_of[g]] += at(g, j) / (T)s.group_size[s.group_of[g]];
    for (long g = 0; g < s.traits.gates; ++g)
      for (long j = 0; j < s.H; ++j) to.put(g * s.H + j, at(g, j) - means[s.group_of[g]]);
  }
};

}  // namespace ISA
