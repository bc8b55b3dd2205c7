// The backward pass over time: from the gradients of outputs to those of products and of the initial state. Gradients of
// weights and input, which are parallel over time, follow in gradients.h.
#pragma once
#include "recurrence.h"

namespace ISA {

// Shared by all threads, of one direction. The recurrence goes back over a segment and leaves the factors of the gradients of
// weights and input in slots, a row for each packed step; they are summed while the slots are still in the cache.
template <class E> struct BackwardBuffers {
  Panels<E> panels;  // of the transposed weights
  Saved<E> saved;
  Blocked<E> d_v[2], x, h_old, unprojected, d_h_projected;  // by slot
  Blocked<Two> pairs[2];                                    // by slot: d_v as the products with weights take it
  long* token_of;                                           // by slot
  Blocked<E> gated_h;                                       // by slot
  Blocked<E> d_h, d_h_new, d_c, d_c_new, d_c_hat, c_old, d_gated_h;
  Blocked<Two> gate_pairs;  // of a cell with a gated h: d_v as its recurrent product takes it, gate after gate
  E* d_weight[3];           // of weight_ih, weight_hh, weight_hr, if they cannot be summed in place
  E* d_inner[2];            // of bias_inner and bias_inner_hh, [columns, chunk]
};

// A weight's gradient [rows, columns]; `wanted` is the caller's tensor, or null.
struct WeightGradient {
  void* wanted;
  long rows, columns;
  int centred_gates;
};

inline WeightGradient weight_gradient_of(const Shape& s, const FestinaCall& call, long d, int weight) {
  long rows = s.traits.gates * s.H;
  void* const* to = call.d_parameters[d];
  if (weight == 0) return {to[FESTINA_WEIGHT_IH], rows, s.I, s.is_centred ? s.traits.gates : 0};
  if (weight == 1)
    return {s.traits.is_diagonal ? nullptr : to[FESTINA_WEIGHT_HH], rows, s.P, s.is_centred ? s.traits.centred_gates() : 0};
  return {to[FESTINA_WEIGHT_HR], s.P, s.H, 0};
}

template <class E> bool is_summed_in_place(const FestinaCall& call, long columns) {
  return !is_narrow(call.type) && columns % chunk<E> == 0;
}

template <class E>
BackwardBuffers<E> take_backward(Arena& arena, Arena& panels, Arena& saved, const Shape& s, const FestinaCall& call, long d) {
  BackwardBuffers<E> b{};
  b.panels = take_vectors<E>(panels, s);
  b.saved = take_saved<E>(saved, s, call.has_zoneout_cell);
  long depth = s.columns() * chunk<E>;
  if (!s.traits.is_diagonal) b.panels.recurrent = panels.take<E>(s.P_chunks * s.depth(depth) * chunk<E>);
  b.panels.input = panels.take<E>(s.I_chunks * s.depth(depth) * chunk<E>);
  if (s.is_projected) b.panels.projection = panels.take<E>(s.H_chunks * s.P_chunks * chunk<E> * chunk<E>);
  long slots = s.segment_slots();
  for (int side = 0; side < s.traits.sides; ++side) {
    b.d_v[side] = arena.take_blocked<E>(s.columns(), slots);
    if (s.is_paired) b.pairs[side] = arena.take_blocked<Two>(ceil_div(s.columns(), 2), slots);
  }
  b.x = arena.take_blocked<E>(s.I_chunks, slots);
  b.h_old = arena.take_blocked<E>(s.P_chunks, slots);
  b.token_of = arena.take<long>(slots);
  b.d_h = arena.take_blocked<E>(s.P_chunks, s.B), b.d_h_new = arena.take_blocked<E>(s.H_chunks, s.B);
  if (s.is_projected) {
    b.d_h_projected = arena.take_blocked<E>(s.P_chunks, slots);
    b.unprojected = arena.take_blocked<E>(s.H_chunks, slots);
  }
  if (s.traits.has_c) {
    b.d_c = arena.take_blocked<E>(s.H_chunks, s.B), b.d_c_new = arena.take_blocked<E>(s.H_chunks, s.B);
    b.c_old = arena.take_blocked<E>(s.H_chunks, s.B);
  }
  if (s.traits.has_inner()) b.d_c_hat = arena.take_blocked<E>(s.H_chunks, s.B);
  if (s.traits.has_gated_h) {
    b.gated_h = arena.take_blocked<E>(s.P_chunks, slots), b.d_gated_h = arena.take_blocked<E>(s.P_chunks, s.B);
    if (s.is_paired) b.gate_pairs = arena.take_blocked<Two>(s.traits.gates * s.pair_chunks(), s.B);
  }
  for (E*& d_inner : b.d_inner) d_inner = arena.take<E>(depth);
  for (int w = 0; w < 3; ++w) {
    WeightGradient f = weight_gradient_of(s, call, d, w);
    if (f.wanted && !is_summed_in_place<E>(call, f.columns))
      b.d_weight[w] = arena.take<E>(f.rows * ceil_div(f.columns, chunk<E>) * chunk<E>);
  }
  return b;
}

// Prefetches cache lines of blocked matrices into L2, `at_once` at each call.
template <class E> struct LinePrefetch {
  Blocked<E> of[3];
  long columns[3], rows, at_once;
  int count, which;
  long column, row;

  void add(Blocked<E> m, long first, long wide) { of[count] = {m.at(first, 0), m.rows}, columns[count++] = wide; }
  long lines() const { return (columns[0] + columns[1] + columns[2]) * rows; }
  void share(long lines, long calls) { at_once = ceil_div(lines, max(1, calls)); }

  INLINE void operator()() {
    for (long i = 0; i < at_once && which < count; ++i) {
      __builtin_prefetch(of[which].at(column, row), 0, 2);
      if (++row < rows) continue;
      row = 0;
      if (++column == columns[which]) column = 0, ++which;
    }
  }
};

template <class E> struct Backward {
  const FestinaCall& call;
  const Shape& s;
  const Kernels<E>& kernels;
  const Part& part;
  const Scratch<E>& my;
  const BackwardBuffers<E>& b;
  E* d_vectors;  // what this thread collects, laid out as Panels<E>::vectors
  Order order;
  Zoneout<E> zone_h, zone_c;
  long first, end, first_P, end_P, steps_left;

  Backward(const FestinaCall& call, const Shape& s, const Kernels<E>& kernels, const Part& part, const Scratch<E>& my,
           const BackwardBuffers<E>& b, E* d_vectors, const long* starts, long d)
      : call(call), s(s), kernels(kernels), part(part), my(my), b(b), d_vectors(d_vectors),
        order{s, starts, d, part.row, part.end_row}, zone_h(zoneout_h<E>(s, call, d)), zone_c(zoneout_c<E>(s, call, d)),
        first(part.first(s.H_chunks)), end(part.end(s.H_chunks)), first_P(part.first(s.P_chunks)), end_P(part.end(s.P_chunks)),
        steps_left(s.T) {
    each_state([&](const void* from, void*, long columns, long n, long stop, Blocked<E> to, long at, long row) {
      Tensor<E> tensor(from, call.type);
      if (tensor)
        tensor.read(at * columns, columns, n, stop, to, row);
      else
        clear_row(to, n, stop, row);
    });
  }

  // Goes back over the next segment: as many steps as there are slots for, and at least one; fewer if the call is to end.
  Segment run_segment() {
    long most = s.segment_rows();
    Segment done{part.team * most + part.row, 0, 0};
    while (steps_left > 0 && (done.rows == 0 || done.rows + order.rows(steps_left - 1) <= most)) {
      bool is_ended = step(--steps_left, done.slot + done.rows);
      done.rows += order.rows(steps_left);
      if (is_ended) break;
    }
    done.steps_left = steps_left;
    return done;
  }

  // The gradients of the initial state, once no step is left.
  void finish() const {
    each_state([&](const void*, void* to, long columns, long n, long stop, Blocked<E> from, long at, long row) {
      if (to) Tensor<E>(to, call.type).write(at * columns, columns, n, stop, from, row);
    });
  }

  template <class Body> void each_state(Body body) const {
    for (long row = part.row; row < part.end_row; ++row) {
      long at = order.d * s.B + row;
      body(call.d_h_n, call.d_h_0, s.P, first_P, end_P, b.d_h, at, row);
      if (s.traits.has_c) body(call.d_c_n, call.d_c_0, s.H, first, end, b.d_c, at, row);
    }
  }

  // The gradient of the cell's new state, from those of the output and of the next step's state. Copies x and the h that
  // the step started from to its slots.
  void finish_step_backward(long t, long slot) {
    long token = order.token(t), before = order.rows(t - 1);
    Tensor<E> d_output(call.d_output, call.type), output(call.output, call.type);
    Tensor<E> input(call.input, call.type), h_0(call.h_0, call.type);
    long rows = order.rows(t);
    for (long n = part.first(s.I_chunks); n < part.end(s.I_chunks); ++n)
      for (long r = 0; r < rows; ++r) input.read((token + r) * s.I, s.I, n, n + 1, b.x, slot + r);
    for (long r = 0; r < rows; ++r) {
      long row = part.row + r, now = token + r, at = order.d * s.B + row, to = slot + r;
      if (part.member == 0) b.token_of[to] = now;
      auto place = [&](long n) { return (n * s.directions + order.d) * s.P; };
      if (d_output) d_output.add(place(now), s.P, first_P, end_P, b.d_h, row);
      if (s.is_projected)
        zone_h.backward(now, first_P, end_P, b.d_h, b.d_h_projected, to, row);
      else if (zone_h.is_active)
        zone_h.backward(now, first, end, b.d_h, b.d_h_new, row, row);
      if (s.traits.has_c && zone_c.is_active) zone_c.backward(now, first, end, b.d_c, b.d_c_new, row, row);
      if (order.is_reset(call, t, r))
        clear_row(b.h_old, first_P, end_P, to);
      else if (r < before)
        output.read(place(order.token(t - 1) + r), s.P, first_P, end_P, b.h_old, to);
      else
        h_0.read(at * s.P, s.P, first_P, end_P, b.h_old, to);
    }
  }

  // The c that a step started from: as the step before saved it if that holds for all rows, else assembled row by row.
  Blocked<E> c_before(long t) {
    long rows = order.rows(t), before = order.rows(t - 1), token = before > 0 ? order.token(t - 1) : 0;
    const Blocked<E>& kept = b.saved.carried.data ? b.saved.carried : b.saved.c;
    bool is_raw = !b.saved.carried.data && (call.cell_norm == FESTINA_CARRIED || call.clip != 0);
    bool is_there = before >= rows && !is_raw;
    for (long r = 0; r < rows && is_there; ++r) is_there = !order.is_reset(call, t, r);
    if (is_there) return from_row(kept, token);
    Tensor<E> c_0(call.c_0, call.type);
    for (long r = 0; r < rows; ++r) {
      long row = part.row + r;
      if (order.is_reset(call, t, r))
        clear_row(b.c_old, first, end, row);
      else if (r >= before)
        c_0.read((order.d * s.B + row) * s.H, s.H, first, end, b.c_old, row);
      else if (is_raw)
        finish_c(token + r, row);
      else
        copy_row(kept, token + r, b.c_old, row, first, end);
    }
    return from_row(b.c_old, part.row);
  }

  // The state c after packed step `token`: normalised, if that is carried, and clipped.
  void finish_c(long token, long row) {
    bool is_normed = call.cell_norm == FESTINA_CARRIED;
    E mean = is_normed ? *saved_sum(s, b.saved, sums_before_c(s), token) : 0;
    E scale = is_normed ? *saved_sum(s, b.saved, sums_before_c(s) + 1, token) : 1, clip = clip_of<E>(call);
    for (long n = first; n < end; ++n)
      for (int l = 0; l < chunk<E>; l += lanes<E>) {
        const E* vectors = b.panels.vectors + n * vectors_a_chunk * chunk<E> + l;
        Vec<E> c = load(b.saved.c.at(n, token) + l);
        if (is_normed) c = (c - mean) * scale * load(vectors + gain_c * chunk<E>) + load(vectors + shift_c * chunk<E>);
        store(b.c_old.at(n, row) + l, clamp(c, -clip, clip));
      }
  }

  void read_sums(long t, long rows) {
    long token = order.token(t);
    for (int side = 0; side < 2; ++side)
      for (int g = 0; s.traits.is_normed[side] && g < s.traits.gates; ++g) {
        for (long r = 0; r < rows; ++r)
          my.scale[side][r * max_gates + g] = *saved_sum(s, b.saved, sums_before(s, side) + s.group_of[g], token + r);
        my.sums.clear(side * max_gates + g, rows);
      }
    if (!s.traits.has_norm_c) return;
    for (long r = 0; r < rows; ++r) {
      my.mean_c[r] = *saved_sum(s, b.saved, sums_before_c(s), token + r);
      my.scale_c[r] = *saved_sum(s, b.saved, sums_before_c(s) + 1, token + r);
    }
    my.sums.clear(sum_of_c, rows), my.sums.clear(sum_of_c + 1, rows);
  }

  // True if the call is to end.
  bool step(long t, long slot) {
    long rows = order.rows(t), token = order.token(t);
    finish_step_backward(t, slot);
    read_sums(t, rows);

    CellStep<E> p{};
    p.rows = rows, p.first = first, p.end = end;
    for (int side = 0; side < 2; ++side) {
      p.v[side] = from_row(b.saved.v[side], token), p.d_v[side] = from_row(b.d_v[side], slot);
      p.scale[side] = my.scale[side];
    }
    p.vectors = b.panels.vectors, p.d_vectors = d_vectors, p.mean_c = my.mean_c, p.scale_c = my.scale_c;
    p.clip = clip_of<E>(call);
    p.h_old = from_row(b.h_old, slot), p.c_raw = from_row(b.saved.c, token);
    if (s.traits.has_c) p.c_old = c_before(t);
    p.is_h_kept = zone_h.is_active, p.is_c_kept = zone_c.is_active;
    p.d_h = from_row(b.d_h, part.row), p.d_h_new = p.is_h_kept || s.is_projected ? from_row(b.d_h_new, part.row) : p.d_h;
    p.d_c = from_row(b.d_c, part.row), p.d_c_new = p.is_c_kept ? from_row(b.d_c_new, part.row) : p.d_c;
    p.d_c_hat = from_row(b.d_c_hat, part.row);
    p.gated_h = from_row(b.gated_h, slot), p.d_gated_h = from_row(b.d_gated_h, part.row);
    p.d_c_hat_mean = my.d_c_hat_mean, p.d_c_hat_dot = my.d_c_hat_dot;
    p.sums = my.sums.own, p.sum_rows = my.sums.rows;

    if (s.is_projected) {
      part.wait();
      Blocked<E> from = from_row(b.d_h_projected, slot);
      long panel = s.P_chunks * chunk<E> * chunk<E>;
      multiply<E>({from.data, my.chunk_at, from.stride()}, rows, {b.panels.projection + first * panel, panel}, end - first, s.P,
                  {p.d_h_new.at(first, 0), my.chunk_at, p.d_h_new.stride()}, false);
      recompute_h(p, slot);
    }
    kernels.emit_backward(p);
    if (s.traits.has_norm_c) {
      norm_c_backward(rows);
      kernels.update_backward(p);
    }
    int gates = s.traits.gates, plain = s.traits.plain_gates();
    if (s.traits.has_gated_h) {
      norms_backward(p, plain, gates);
      gates_backward(p, plain, gates, p.d_gated_h, false, {});
      kernels.update_backward(p);
    }
    norms_backward(p, 0, plain);
    if (s.is_paired) narrow_products(p, slot);
    part.look(s.work(rows) / part.members);
    bool is_ended = s.traits.is_diagonal ? part.wait() : recurrent_product_backward(p, slot, prefetch_of(t - 1, rows));
    for (long r = 0; r < rows; ++r) {
      if (!order.is_reset(call, t, r)) continue;
      clear_row(b.d_h, first_P, end_P, part.row + r);
      if (s.traits.has_c) clear_row(b.d_c, first, end, part.row + r);
    }
    return is_ended;
  }

  // For the gradient of the input, and for that of h.
  void narrow_products(const CellStep<E>& p, long slot) const {
    if constexpr (can_pair<E>)
      for (int side = 0; side < s.traits.sides; ++side) {
        bool is_of_h = side == s.traits.sides - 1 && !s.traits.has_gated_h;
        if (!is_of_h && !(side == 0 && call.d_input)) continue;
        for (long n = first * s.traits.gates; n < end * s.traits.gates; ++n)
          for (long r = 0; r < p.rows; ++r) narrow(p.d_v[side], n, r, b.pairs[side], slot + r);
      }
  }

  // d_h from the gradients of products. A thread begins with those of its own chunks, while others finish theirs. True if the
  // call is to end.
  bool recurrent_product_backward(const CellStep<E>& p, long slot, LinePrefetch<E> ahead) const {
    if (s.traits.has_gated_h) return gates_backward(p, 0, s.traits.plain_gates(), p.d_h, true, ahead);
    int side = s.traits.sides - 1;
    long gates = s.traits.gates, depth = s.depth(s.columns() * chunk<E>), panel = depth * chunk<E>;
    bool is_begun = p.is_h_kept || !s.traits.has_c;
    // Adds terms [from, stop) of the sum; `left` begins at the first of them.
    auto sum_over = [&](auto left, long from, long stop) {
      if (from == stop) return;
      add_terms(p, left, b.panels.recurrent + from * chunk<E>, panel, stop - from, p.d_h, is_begun, ahead);
      is_begun = true;
    };
    if constexpr (can_pair<E>) {
      if (s.is_paired) {  // two columns share a chunk of pairs, and may belong to two threads
        bool is_ended = part.wait();
        sum_over(from_row(b.pairs[side], slot), 0, depth);
        return is_ended;
      }
    }
    auto columns = [&](long column, long stop) {
      sum_over(Blocked<E>{p.d_v[side].at(column, 0), p.d_v[side].rows}, column * chunk<E>, stop * chunk<E>);
    };
    columns(first * gates, end * gates);
    bool is_ended = part.wait();
    columns(0, first * gates);
    columns(end * gates, s.columns());
    return is_ended;
  }

  // Of gates [from, to) alone, of a cell with a gated h, whose panels lie gate after gate: to `d`, or added to it. True if the
  // call is to end.
  bool gates_backward(const CellStep<E>& p, int from, int to, Blocked<E> d, bool is_added, LinePrefetch<E> ahead) const {
    const Blocked<E>& d_v = p.d_v[s.traits.sides - 1];
    long depth = s.depth(s.H_chunks * chunk<E>), panel = depth * chunk<E>;
    auto of_gate = [&](int g) { return Blocked<E>{d_v.at(g, 0), d_v.rows * s.traits.gates}; };
    auto pairs_of = [&](int g) {
      return from_row(Blocked<Two>{b.gate_pairs.at(g * s.pair_chunks(), 0), b.gate_pairs.rows}, part.row);
    };
    if constexpr (can_pair<E>)
      for (int g = from; s.is_paired && g < to; ++g)
        for (long n = first; n < end; ++n)
          for (long r = 0; r < p.rows; ++r) narrow(of_gate(g), n, r, pairs_of(g), r);
    bool is_ended = part.wait();
    for (int g = from; g < to; ++g)
      with_factor<E>(s.is_paired, pairs_of(g), of_gate(g), [&](auto left) {
        add_terms(p, left, b.panels.recurrent + g * s.P_chunks * panel, panel, depth, d, is_added || g > from, ahead);
      });
    return is_ended;
  }

  // A product of `depth` terms, or pairs of them: to this thread's chunks of `d`, or added to them. Panels lie `panel` apart.
  template <class F> void add_terms(const CellStep<E>& p, Blocked<F> left, const E* right, long panel, long depth, Blocked<E> d,
                                    bool is_added, LinePrefetch<E>& ahead) const {
    part.in_pieces(end_P - first_P, 1, p.rows * depth * chunk<F>, [&](long n, long some) {
      multiply<F>({left.data, my.chunk_at, left.stride()}, p.rows, {(const F*)right + (first_P + n) * panel, panel}, some,
                  depth, {d.at(first_P + n, 0), my.chunk_at, d.stride()}, is_added, {}, [&] { ahead(); });
    });
  }

  // What the kernels of step t will read first, to be prefetched a few lines at a time during the product of the step at
  // hand: at most 256 KB, since L2 has other uses.
  LinePrefetch<E> prefetch_of(long t, long rows) const {
    constexpr long most = 4096;
    LinePrefetch<E> ahead{};
    ahead.rows = order.rows(t);
    if (rows == 0 || ahead.rows == 0) return ahead;
    long token = order.token(t), gates = s.traits.gates, columns = (end - first) * gates;
    if (s.traits.has_c) ahead.add(from_row(b.saved.c, token), first, end - first);
    for (int side = 0; side < s.traits.sides; ++side) ahead.add(from_row(b.saved.v[side], token), first * gates, columns);
    ahead.share(min(most, ahead.lines()), Tiling<E>(rows).count(end_P - first_P, s.depth(s.columns() * chunk<E>)));
    return ahead;
  }

  // The h before its projection, which training does not save.
  void recompute_h(const CellStep<E>& backward, long slot) {
    CellStep<E> p = backward;
    p.h = from_row(b.unprojected, slot);
    p.c = from_row(b.d_c_hat, part.row), p.c_raw = {};  // d_c_hat is free until emit_backward
    if (s.traits.has_norm_c)
      for (long r = 0; r < p.rows; ++r) copy_row(backward.c_raw, r, p.c, r, first, end);
    kernels.emit(p);
  }

  void norm_c_backward(long rows) {
    my.sums.publish(sum_of_c, rows), my.sums.publish(sum_of_c + 1, rows);
    part.wait();
    for (long r = 0; r < rows; ++r) {
      my.d_c_hat_mean[r] = call.rms ? E(0) : my.sums.total(part, sum_of_c, r) / (E)s.H;
      my.d_c_hat_dot[r] = my.sums.total(part, sum_of_c + 1, r) / (E)s.H;
    }
  }

  // Of gates [from, to).
  void norms_backward(const CellStep<E>& p, int from, int to) {
    if (!s.traits.is_normed[0] && !s.traits.is_normed[1]) return;
    for (int side = 0; side < 2; ++side)
      for (int g = from; s.traits.is_normed[side] && g < to; ++g) my.sums.publish(side * max_gates + g, p.rows);
    part.wait();
    for (int side = 0; side < 2; ++side) {
      if (!s.traits.is_normed[side]) continue;
      for (long r = 0; r < p.rows; ++r)
        norm_correction(s, part, my.sums, side, from, to, r, my.scale[side] + r * max_gates,
                        my.correction[side] + r * max_gates);
      norm_backward(s, from, min(to, s.traits.normed_gates(side)), first, end, p.rows, my.scale[side], my.correction[side],
                    p.v[side], p.d_v[side]);
    }
    if (!s.traits.has_split_sum()) return;
    for (long n = first * s.traits.gates; n < end * s.traits.gates; ++n)  // the gradient of a sum is that of both terms
      for (long r = 0; r < p.rows && n % s.traits.gates < s.traits.gates - 1; ++r) copy_row(p.d_v[0], r, p.d_v[1], r, n, n + 1);
  }
};

}  // namespace ISA
