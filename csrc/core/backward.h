// The backward pass over time: from the gradients of outputs to those of products and of the initial state. What is
// parallel over time follows in gradients.h.
#pragma once
#include "recurrence.h"

namespace ISA {

// Shared by all threads, of one direction. The recurrence goes back over a stretch of steps and leaves in slots what
// gradients of weights and input are made of; these are summed while the slots are still in the cache.
template <class T> struct BackwardBuffers {
  Packed<T> vectors;
  Saved<T> saved;
  T *recurrent, *input, *projection;  // panels of the products of the backward pass
  Blocked<T> d_v[2], x, h_old, unprojected, d_h_projected;  // by slot
  Blocked<Two> pairs[2];                                    // by slot: d_v as the products with weights take it
  long* token_of;                                           // by slot
  Blocked<T> d_h, d_h_new, d_c, d_c_new, d_seen, c_old;
  T* d_weight[3];  // of weight_ih, weight_hh, weight_hr, where they cannot be summed in place
  T* d_inner;      // [columns, chunk]
};

// A weight's gradient [rows, columns]; `wanted` is where it goes, or null.
struct Factors {
  void* wanted;
  long rows, columns;
  bool is_centred;
};

inline Factors factors_of(const Shape& s, const FestinaCall& call, long d, int weight) {
  long rows = s.traits.gates * s.H;
  void* const* to = call.d_parameters[d];
  if (weight == 0) return {to[FESTINA_WEIGHT_IH], rows, s.I, s.is_centred};
  if (weight == 1) return {s.traits.is_diagonal ? nullptr : to[FESTINA_WEIGHT_HH], rows, s.P, s.is_centred};
  return {to[FESTINA_WEIGHT_HR], s.P, s.H, false};
}

template <class T> bool is_summed_in_place(const FestinaCall& call, long columns) {
  return call.type != FESTINA_BFLOAT16 && columns % chunk<T> == 0;
}

template <class T>
BackwardBuffers<T> take_backward(Arena& arena, Arena& packed, Arena& saved, const Shape& s, const FestinaCall& call, long d) {
  BackwardBuffers<T> b{};
  b.vectors = take_vectors<T>(packed, s);
  b.saved = take_saved<T>(saved, s, call.has_zoneout_cell);
  long depth = s.columns() * chunk<T>;
  if (!s.traits.is_diagonal) b.recurrent = packed.take<T>(s.width * s.depth(depth) * chunk<T>);
  b.input = packed.take<T>(s.inputs * s.depth(depth) * chunk<T>);
  if (s.is_projected) b.projection = packed.take<T>(s.units * s.width * chunk<T> * chunk<T>);
  long slots = s.stretch_slots();
  for (int side = 0; side < s.traits.sides; ++side) {
    b.d_v[side] = arena.take_blocked<T>(s.columns(), slots);
    if (s.is_paired) b.pairs[side] = arena.take_blocked<Two>(ceil_div(s.columns(), 2), slots);
  }
  b.x = arena.take_blocked<T>(s.inputs, slots);
  b.h_old = arena.take_blocked<T>(s.width, slots);
  b.token_of = arena.take<long>(slots);
  b.d_h = arena.take_blocked<T>(s.width, s.B), b.d_h_new = arena.take_blocked<T>(s.units, s.B);
  if (s.is_projected) {
    b.d_h_projected = arena.take_blocked<T>(s.width, slots);
    b.unprojected = arena.take_blocked<T>(s.units, slots);
  }
  if (s.traits.has_c) {
    b.d_c = arena.take_blocked<T>(s.units, s.B), b.d_c_new = arena.take_blocked<T>(s.units, s.B);
    b.d_seen = arena.take_blocked<T>(s.units, s.B), b.c_old = arena.take_blocked<T>(s.units, s.B);
  }
  b.d_inner = arena.take<T>(depth);
  for (int w = 0; w < 3; ++w) {
    Factors f = factors_of(s, call, d, w);
    if (f.wanted && !is_summed_in_place<T>(call, f.columns))
      b.d_weight[w] = arena.take<T>(f.rows * ceil_div(f.columns, chunk<T>) * chunk<T>);
  }
  return b;
}

// Lines of blocked matrices on their way into L2, `at_once` of them at each call.
template <class T> struct Ahead {
  Blocked<T> of[3];
  long columns[3], rows, at_once;
  int count, which;
  long column, row;

  void add(Blocked<T> m, long first, long wide) { of[count] = {m.at(first, 0), m.rows}, columns[count++] = wide; }
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

template <class T> struct Backward {
  const FestinaCall& call;
  const Shape& s;
  const Kernels<T>& kernels;
  const Part& part;
  const Scratch<T>& my;
  const BackwardBuffers<T>& b;
  T* d_vectors;  // what this thread collects, laid out as Packed<T>::vectors
  Order order;
  Zoneout<T> zone_h, zone_c;
  long first, end, first_wide, end_wide, steps_left;

  Backward(const FestinaCall& call, const Shape& s, const Kernels<T>& kernels, const Part& part, const Scratch<T>& my,
           const BackwardBuffers<T>& b, T* d_vectors, const long* starts, long d)
      : call(call), s(s), kernels(kernels), part(part), my(my), b(b), d_vectors(d_vectors),
        order{s, starts, d, part.row, part.end_row}, zone_h(zoneout_h<T>(s, call, d)), zone_c(zoneout_c<T>(s, call, d)),
        first(part.first(s.units)), end(part.end(s.units)), first_wide(part.first(s.width)), end_wide(part.end(s.width)),
        steps_left(s.T) {
    each_state([&](const void* from, void*, long columns, long n, long stop, Blocked<T> to, long at, long row) {
      Tensor<T> tensor(from, call.type);
      if (tensor)
        tensor.read(at * columns, columns, n, stop, to, row);
      else
        clear_row(to, n, stop, row);
    });
  }

  // The next stretch: as many steps as there are slots for, and at least one.
  Stretch go_back() {
    long most = s.stretch();
    Stretch stretch{part.group * most + part.row, 0, 0};
    while (steps_left > 0 && (stretch.rows == 0 || stretch.rows + order.rows(steps_left - 1) <= most)) {
      retreat(--steps_left, stretch.slot + stretch.rows);
      stretch.rows += order.rows(steps_left);
    }
    stretch.steps_left = steps_left;
    return stretch;
  }

  // The gradients of the initial state, once no step is left.
  void finish() const {
    each_state([&](const void*, void* to, long columns, long n, long stop, Blocked<T> from, long at, long row) {
      if (to) Tensor<T>(to, call.type).write(at * columns, columns, n, stop, from, row);
    });
  }

  template <class Body> void each_state(Body body) const {
    for (long row = part.row; row < part.end_row; ++row) {
      long at = order.d * s.B + row;
      body(call.d_h_n, call.d_h_0, s.P, first_wide, end_wide, b.d_h, at, row);
      if (s.traits.has_c) body(call.d_c_n, call.d_c_0, s.H, first, end, b.d_c, at, row);
    }
  }

  bool is_reset(long step, long r) const {
    return call.resets && call.resets[order.d * s.N + order.token(step) + r];
  }

  // The h that a step began with, and the gradient of the state that it made.
  void prepare(long step, long slot) {
    long token = order.token(step), before = order.rows(step - 1);
    Tensor<T> d_output(call.d_output, call.type), output(call.output, call.type);
    Tensor<T> input(call.input, call.type), h_0(call.h_0, call.type);
    long rows = order.rows(step);
    for (long n = part.first(s.inputs); n < part.end(s.inputs); ++n)
      for (long r = 0; r < rows; ++r) input.read((token + r) * s.I, s.I, n, n + 1, b.x, slot + r);
    for (long r = 0; r < rows; ++r) {
      long row = part.row + r, now = token + r, at = order.d * s.B + row, to = slot + r;
      if (part.member == 0) b.token_of[to] = now;
      auto place = [&](long n) { return (n * s.directions + order.d) * s.P; };
      if (d_output) d_output.add(place(now), s.P, first_wide, end_wide, b.d_h, row);
      if (s.is_projected)
        zone_h.backward(now, first_wide, end_wide, b.d_h, b.d_h_projected, to, row);
      else if (zone_h.is_active)
        zone_h.backward(now, first, end, b.d_h, b.d_h_new, row, row);
      if (s.traits.has_c && zone_c.is_active) zone_c.backward(now, first, end, b.d_c, b.d_c_new, row, row);
      if (is_reset(step, r))
        clear_row(b.h_old, first_wide, end_wide, to);
      else if (r < before)
        output.read(place(order.token(step - 1) + r), s.P, first_wide, end_wide, b.h_old, to);
      else
        h_0.read(at * s.P, s.P, first_wide, end_wide, b.h_old, to);
    }
  }

  // The c that a step began with: what the step before it saved, or else put together row by row.
  Blocked<T> c_before(long step) {
    long rows = order.rows(step), before = order.rows(step - 1), token = before > 0 ? order.token(step - 1) : 0;
    const Blocked<T>& kept = b.saved.carried.data ? b.saved.carried : b.saved.c;
    bool is_normed = !b.saved.carried.data && call.cell_norm == FESTINA_CARRIED, is_there = before >= rows && !is_normed;
    for (long r = 0; r < rows && is_there; ++r) is_there = !is_reset(step, r);
    if (is_there) return from_row(kept, token);
    Tensor<T> c_0(call.c_0, call.type);
    for (long r = 0; r < rows; ++r) {
      long row = part.row + r;
      if (is_reset(step, r))
        clear_row(b.c_old, first, end, row);
      else if (r >= before)
        c_0.read((order.d * s.B + row) * s.H, s.H, first, end, b.c_old, row);
      else if (is_normed)
        normalise(token + r, row);
      else
        copy_row(kept, token + r, b.c_old, row, first, end);
    }
    return from_row(b.c_old, part.row);
  }

  // The state c that step `token` left, where the norm's result is carried on.
  void normalise(long token, long row) {
    T mean = *saved_sum(s, b.saved, sums_before_c(s), token), scale = *saved_sum(s, b.saved, sums_before_c(s) + 1, token);
    for (long n = first; n < end; ++n)
      for (int l = 0; l < chunk<T>; l += lanes<T>) {
        const T* vectors = b.vectors.vectors + n * vectors_a_unit * chunk<T> + l;
        Vec<T> c = (load(b.saved.c.at(n, token) + l) - mean) * scale;
        store(b.c_old.at(n, row) + l, c * load(vectors + gain_c * chunk<T>) + load(vectors + shift_c * chunk<T>));
      }
  }

  void read_sums(long step, long rows) {
    long token = order.token(step);
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

  void retreat(long step, long slot) {
    long rows = order.rows(step), token = order.token(step);
    prepare(step, slot);
    read_sums(step, rows);

    Step<T> p{};
    p.rows = rows, p.first = first, p.end = end;
    for (int side = 0; side < 2; ++side) {
      p.v[side] = from_row(b.saved.v[side], token), p.d_v[side] = from_row(b.d_v[side], slot);
      p.scale[side] = my.scale[side];
    }
    p.vectors = b.vectors.vectors, p.d_vectors = d_vectors, p.mean_c = my.mean_c, p.scale_c = my.scale_c;
    p.h_old = from_row(b.h_old, slot), p.c_raw = from_row(b.saved.c, token);
    if (s.traits.has_c) p.c_old = c_before(step);
    p.is_h_kept = zone_h.is_active, p.is_c_kept = zone_c.is_active;
    p.d_h = from_row(b.d_h, part.row), p.d_h_new = p.is_h_kept || s.is_projected ? from_row(b.d_h_new, part.row) : p.d_h;
    p.d_c = from_row(b.d_c, part.row), p.d_c_new = p.is_c_kept ? from_row(b.d_c_new, part.row) : p.d_c;
    p.d_seen = from_row(b.d_seen, part.row);
    p.mean_d_seen = my.mean_d_seen, p.mean_d_seen_hat = my.mean_d_seen_hat;
    p.sums = my.sums.own, p.sum_rows = my.sums.rows;

    if (s.is_projected) {
      part.wait();
      Blocked<T> from = from_row(b.d_h_projected, slot);
      long panel = s.width * chunk<T> * chunk<T>;
      multiply<T>({from.data, my.chunk_at, from.step()}, rows, {b.projection + first * panel, panel}, end - first, s.P,
                  {p.d_h_new.at(first, 0), my.chunk_at, p.d_h_new.step()}, false);
      unproject(p, slot);
    }
    kernels.emit_backward(p);
    if (s.traits.has_norm_c) {
      finish_seen(rows);
      kernels.update_backward(p);
    }
    finish_norms(p);
    if (s.is_paired) narrow_products(p, slot);
    if (s.traits.is_diagonal)
      part.wait();
    else
      multiply_back(p, slot, next_step(step - 1, rows));
    for (long r = 0; r < rows; ++r) {
      if (!is_reset(step, r)) continue;
      clear_row(b.d_h, first_wide, end_wide, part.row + r);
      if (s.traits.has_c) clear_row(b.d_c, first, end, part.row + r);
    }
  }

  void narrow_products(const Step<T>& p, long slot) const {
    if constexpr (can_pair<T>)
      for (int side = call.d_input ? 0 : s.traits.sides - 1; side < s.traits.sides; ++side)
        for (long n = first * s.traits.gates; n < end * s.traits.gates; ++n)
          for (long r = 0; r < p.rows; ++r) narrow(p.d_v[side], n, r, b.pairs[side], slot + r);
  }

  // d_h from the gradients of products. A thread begins with those of its own units, while others finish theirs.
  void multiply_back(const Step<T>& p, long slot, Ahead<T> ahead) const {
    int side = s.traits.sides - 1;
    long gates = s.traits.gates, depth = s.depth(s.columns() * chunk<T>), panel = depth * chunk<T>;
    bool is_begun = p.is_h_kept || !s.traits.has_c;
    // The sum over terms [from, stop) of a left operand that begins there.
    auto sum_over = [&](auto left, long from, long stop) {
      using E = typename decltype(left)::Element;
      if (from == stop) return;
      multiply<E>({left.data, my.chunk_at, left.step()}, p.rows,
                  {(const E*)b.recurrent + first_wide * panel + from * chunk<E>, panel}, end_wide - first_wide, stop - from,
                  {p.d_h.at(first_wide, 0), my.chunk_at, p.d_h.step()}, is_begun, {}, [&] { ahead(); });
      is_begun = true;
    };
    if constexpr (can_pair<T>) {
      if (s.is_paired) {  // two columns share a chunk of pairs, and may belong to two threads
        part.wait();
        return sum_over(from_row(b.pairs[side], slot), 0, depth);
      }
    }
    auto columns = [&](long column, long stop) {
      sum_over(Blocked<T>{p.d_v[side].at(column, 0), p.d_v[side].rows}, column * chunk<T>, stop * chunk<T>);
    };
    columns(first * gates, end * gates);
    part.wait();
    columns(0, first * gates);
    columns(end * gates, s.columns());
  }

  // What the kernels will read first of the step that comes next, fetched a few lines at a time beside the product that
  // is made now, 256 KB at most: L2 has other uses.
  Ahead<T> next_step(long step, long rows) const {
    constexpr long most = 4096;
    Ahead<T> ahead{};
    ahead.rows = order.rows(step);
    if (rows == 0 || ahead.rows == 0) return ahead;
    long token = order.token(step), gates = s.traits.gates, columns = (end - first) * gates;
    if (s.traits.has_c) ahead.add(from_row(b.saved.c, token), first, end - first);
    for (int side = 0; side < s.traits.sides; ++side) ahead.add(from_row(b.saved.v[side], token), first * gates, columns);
    ahead.share(min(most, ahead.lines()), Tiling<T>(rows).count(end_wide - first_wide, s.depth(s.columns() * chunk<T>)));
    return ahead;
  }

  // The h before its projection, which was not kept.
  void unproject(const Step<T>& backward, long slot) {
    Step<T> p = backward;
    p.h = from_row(b.unprojected, slot);
    p.c = from_row(b.d_seen, part.row), p.c_raw = {};  // d_seen is free until emit_backward
    if (s.traits.has_norm_c)
      for (long r = 0; r < p.rows; ++r) copy_row(backward.c_raw, r, p.c, r, first, end);
    kernels.emit(p);
  }

  void finish_seen(long rows) {
    my.sums.publish(sum_of_c, rows), my.sums.publish(sum_of_c + 1, rows);
    part.wait();
    for (long r = 0; r < rows; ++r) {
      my.mean_d_seen[r] = call.rms ? T(0) : my.sums.total(part, sum_of_c, r) / (T)s.H;
      my.mean_d_seen_hat[r] = my.sums.total(part, sum_of_c + 1, r) / (T)s.H;
    }
  }

  void finish_norms(const Step<T>& p) {
    if (!s.traits.is_normed[0] && !s.traits.is_normed[1]) return;
    for (int side = 0; side < 2; ++side)
      for (int g = 0; s.traits.is_normed[side] && g < s.traits.gates; ++g) my.sums.publish(side * max_gates + g, p.rows);
    part.wait();
    for (int side = 0; side < 2; ++side) {
      if (!s.traits.is_normed[side]) continue;
      for (long r = 0; r < p.rows; ++r)
        norm_pull(s, part, my.sums, side, r, my.scale[side] + r * max_gates, my.pull[side] + r * max_gates);
      norm_backward(s, first, end, p.rows, my.scale[side], my.pull[side], p.v[side], p.d_v[side]);
    }
  }
};

}  // namespace ISA
