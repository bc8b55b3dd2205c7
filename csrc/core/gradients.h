// The gradients of weights and input, as products over the rows of a segment, and of vectors, as sums.
#pragma once
#include "backward.h"

namespace ISA {

template <class E> struct Gradients {
  const FestinaCall& call;
  const Shape& s;
  const BackwardBuffers<E>* b;  // [directions]
  const Segment* segments;      // [directions, threads]
  E* const (*collected)[2];     // [threads, directions]: d_vectors of each
  const Scratch<E>& my;
  Blocked<E> d_rows;  // of this thread: a few rows of d_input
  long workers, teams;
  long direction = 0, end_direction = 0;  // those whose segments are to be summed
  bool is_first = true;                   // nothing has been summed yet

  const Segment& segment(long d, long team) const { return segments[d * s.threads + team]; }

  bool has_steps_left() const {
    for (long d = direction; d < end_direction; ++d)
      for (long team = 0; team < teams; ++team)
        if (segment(d, team).steps_left > 0) return true;
    return false;
  }

  // Carries out a task by its number; false past the last. Large tasks come first.
  bool sum_segment(long task) const {
    if (is_input(direction, task)) return true;
    for (long d = direction; d < end_direction; ++d) {
      for (int w = 0; w < 3; ++w) {
        WeightGradient f = weight_gradient_of(s, call, d, w);
        long most = min(gradient_rows, max(TILE_ROWS, f.rows / (4 * workers) / TILE_ROWS * TILE_ROWS));
        long count = f.wanted ? ceil_div(f.rows, most) : 0;
        if (task < count) return sum_weight(d, w, f, task * most, min(most, f.rows - task * most)), true;
        task -= count;
      }
      for (int inner = 0; inner < 2; ++inner)
        if (!s.is_paired && wanted_inner(d, inner) && task-- == 0) {
          for (long n = 0; n < s.columns(); ++n) sum_inner(d, inner, n);
          return true;
        }
    }
    return false;
  }

  // Replaces both factors of the weights' gradients by pairs of slots, after the tasks that need them unpaired.
  bool pair(long task) const {
    if constexpr (can_pair<E>) {
      for (long d = direction; d < end_direction; ++d) {
        const BackwardBuffers<E>& from = b[d];
        const Blocked<E> factors[] = {from.d_v[0], from.d_v[1], from.x, from.h_old, from.gated_h};
        const long chunks[] = {s.columns(), s.traits.sides == 2 ? s.columns() : 0, s.I_chunks,
                               s.traits.is_diagonal ? 0 : s.P_chunks, s.traits.has_gated_h ? s.P_chunks : 0};
        for (int i = 0; i < 5; ++i) {
          if (task >= chunks[i]) {
            task -= chunks[i];
            continue;
          }
          for (int inner = 0; inner < 2; ++inner)
            if (wanted_inner(d, inner) && i == side_of_inner(inner)) sum_inner(d, inner, task);
          for (long team = 0; team < teams; ++team)
            pair_rows(factors[i].at(task, segment(d, team).slot), segment(d, team).rows);
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
    for (long team = 0; call.d_input && team < teams; ++team) {
      long rows = segment(d, team).rows, count = min(rows, max(ceil_div(rows, gradient_rows), ceil_div(workers, teams)));
      if (task < count) return sum_input(d, segment(d, team).slot, rows * task / count, rows * (task + 1) / count), true;
      task -= count;
    }
    return false;
  }

  // After the last segment: means of whole columns of a weight's gradient, and sums over threads.
  bool finish(long task) const {
    for (long d = 0; d < s.directions; ++d) {
      for (int w = 0; w < 3; ++w) {
        WeightGradient f = weight_gradient_of(s, call, d, w);
        bool is_needed = f.wanted && (f.centred_gates || b[d].d_weight[w]);
        long count = is_needed ? ceil_div(f.columns, finish_columns) : 0;
        if (task < count) return finish_weight(d, w, f, task * finish_columns), true;
        task -= count;
      }
      if (task-- == 0) return finish_vectors(d), true;
    }
    return false;
  }

  static constexpr long finish_columns = 64;

  struct Rows {
    E* data;
    long stride;
  };
  Rows rows_of(long d, int w, const WeightGradient& f) const {
    if (E* own = b[d].d_weight[w]) return {own, ceil_div(f.columns, chunk<E>) * chunk<E>};
    return {(E*)f.wanted, f.columns};
  }

  void sum_weight(long d, int w, const WeightGradient& f, long row, long count) const {
    constexpr int C = chunk<E>;
    long H = w == 2 ? s.P : s.H, gates = f.rows / H;
    Blocked<E> left = w == 0 ? b[d].d_v[0] : w == 1 ? b[d].d_v[s.traits.sides - 1] : b[d].d_h_projected;
    Blocked<E> right = w == 0 ? b[d].x : w == 1 ? b[d].h_old : b[d].unprojected;
    Rows to = rows_of(d, w, f);
    for (long i = 0; i < count; ++i) {
      long gate = (row + i) / H, j = (row + i) % H;
      my.left_at[i] = (j / C * gates + gate) * left.stride() + j % C;
      my.target_at[i] = (row + i) * to.stride;
    }
    bool is_paired = s.is_paired && w < 2;
    auto sum = [&](long first, long rows, Blocked<E> right) {
      with_factor<E>(is_paired, Two{}, E{}, [&](auto e) {
        using F = decltype(e);
        for (long team = 0; team < teams; ++team) {
          const Segment& over = segment(d, team);
          multiply<F, C>({(const F*)left.data + over.slot * C, my.left_at + first, C * C}, rows,
                         {(const F*)right.data + over.slot * C, right.stride()}, ceil_div(f.columns, C),
                         is_paired ? s.depth(over.rows) : over.rows, {to.data, my.target_at + first, C}, !is_first || team > 0);
        }
      });
    };
    long plain = w == 1 ? min(count, max(0, s.traits.plain_gates() * H - row)) : count;
    sum(0, plain, right);
    sum(plain, count - plain, b[d].gated_h);  // rows of a gate that takes in the gated h
  }

  void finish_weight(long d, int w, const WeightGradient& f, long column) const {
    Rows from = rows_of(d, w, f);
    Tensor<E> to(f.wanted, call.type);
    long count = min(finish_columns, f.columns - column);
    for (int group = 0; group < (w == 2 ? 1 : s.groups); ++group) {
      auto each_row = [&](auto body) {
        for (long row = 0; row < f.rows; ++row)
          if (w == 2 || s.group_of[row / s.H] == group) body(row, from.data + row * from.stride + column);
      };
      E mean[finish_columns] = {};
      bool is_centred = false;
      for (int g = 0; g < f.centred_gates; ++g) is_centred |= s.group_of[g] == group;
      if (is_centred) {
        each_row([&](long, const E* x) {
          for (long k = 0; k < count; ++k) mean[k] += x[k];
        });
        for (long k = 0; k < count; ++k) mean[k] /= (E)s.group_size[group];
      }
      each_row([&](long row, E* x) {
        if (!b[d].d_weight[w])
          for (long k = 0; k < count; ++k) x[k] -= mean[k];
        else
          for (long k = 0; k < count; ++k) to.put(row * f.columns + column + k, x[k] - mean[k]);
      });
    }
  }

  void sum_input(long d, long slot, long row, long end) const {
    long depth = s.depth(s.columns() * chunk<E>);
    with_factor<E>(s.is_paired, b[d].pairs[0], b[d].d_v[0], [&](auto left) {
      using F = typename decltype(left)::Element;
      multiply<F>({left.at(0, slot + row), my.chunk_at, left.stride()}, end - row,
                  {(const F*)b[d].panels.input, depth * chunk<F>}, s.I_chunks, depth,
                  {d_rows.data, my.chunk_at, d_rows.stride()}, false);
    });
    Tensor<E> to(call.d_input, call.type);
    for (long r = row; r < end; ++r)
      to.write(b[d].token_of[slot + r] * s.I, s.I, 0, s.I_chunks, d_rows, r - row, s.directions == 2);
  }

  // bias_inner is added to side 0, bias_inner_hh to what the recurrent product is added to; its gradient is in the last side.
  void* wanted_inner(long d, int inner) const {
    return call.d_parameters[d][inner ? FESTINA_BIAS_INNER_HH : FESTINA_BIAS_INNER];
  }
  int side_of_inner(int inner) const { return inner ? s.traits.sides - 1 : 0; }

  void sum_inner(long d, int inner, long n) const {
    Blocked<E> d_v = b[d].d_v[side_of_inner(inner)];
    for (int l = 0; l < chunk<E>; l += lanes<E>) {
      E* to = b[d].d_inner[inner] + n * chunk<E> + l;
      Vec<E> total = is_first ? broadcast(E(0)) : load(to);
      for (long team = 0; team < teams; ++team)
        for (long r = 0; r < segment(d, team).rows; ++r) total += load(d_v.at(n, segment(d, team).slot + r) + l);
      store(to, total);
    }
  }

  // Sums over threads of the vectors that `which` gives for each gate.
  template <class Which> void write_vector(void* wanted, long d, long gates, Which which) const {
    if (!wanted) return;
    Tensor<E> to(wanted, call.type);
    for (long g = 0; g < gates; ++g)
      for (long j = 0; j < s.H; ++j) {
        E total = 0;
        for (long worker = 0; worker < s.threads; ++worker) total += vector_at(collected[worker][d], which(g), j);
        to.put(g * s.H + j, total);
      }
  }

  void finish_vectors(long d) const {
    void* const* to = call.d_parameters[d];
    int gates = s.traits.gates;
    auto gain = [](int side) { return [side](int g) { return gain_of(side, g); }; };
    auto shift_x = [](int g) { return shift_of(0, g); };
    // Both sides take the same gradient, except for a split candidate.
    auto shift_h = [&](int g) { return shift_of(s.traits.has_split_candidate && g == gates - 1, g); };
    write_vector(to[FESTINA_BIAS_IH], d, gates, shift_x);
    write_vector(to[FESTINA_BIAS_JOINT], d, gates, shift_x);
    write_vector(to[FESTINA_BIAS_HH], d, gates, shift_h);
    write_vector(to[FESTINA_GAIN_IH], d, gates, gain(0));
    write_vector(to[FESTINA_GAIN_JOINT], d, gates, gain(0));
    write_vector(to[FESTINA_GAIN_HH], d, gates, gain(1));
    write_vector(to[FESTINA_GAIN_C], d, 1, [](int) { return gain_c; });
    write_vector(to[FESTINA_BIAS_C], d, 1, [](int) { return shift_c; });
    if (s.traits.is_diagonal) write_vector(to[FESTINA_WEIGHT_HH], d, 1, [](int) { return diagonal; });
    for (int inner = 0; inner < 2; ++inner)
      if (void* wanted = wanted_inner(d, inner))
        finish_inner(b[d].d_inner[inner], inner ? s.traits.centred_gates() : gates, Tensor<E>(wanted, call.type));
  }

  void finish_inner(const E* inner, int centred_gates, Tensor<E> to) const {
    E means[max_gates] = {};
    auto at = [&](long g, long j) { return inner[(j / chunk<E> * s.traits.gates + g) * chunk<E> + j % chunk<E>]; };
    for (long g = 0; s.is_centred && g < centred_gates; ++g)
      for (long j = 0; j < s.H; ++j) means[s.group_of[g]] += at(g, j) / (E)s.group_size[s.group_of[g]];
    for (long g = 0; g < s.traits.gates; ++g)
      for (long j = 0; j < s.H; ++j) to.put(g * s.H + j, at(g, j) - means[s.group_of[g]]);
  }
};

}  // namespace ISA
