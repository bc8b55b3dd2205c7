// The forward pass over time. The loop is told once; cells and plans differ only in the kernels it is given.
#pragma once
#include "recurrence.h"

namespace ISA {

// State and products of one direction, shared by all threads. h and c change sides at every step, so that a thread may
// write the new state while another still reads the old one.
template <class T> struct ForwardBuffers {
  Packed<T> packed;
  Saved<T> saved;
  Blocked<T> h[2], c[2], unprojected;
  Blocked<T> v[2];  // inference: products of the steps at hand
  Means<T> means;
};

template <class T>
ForwardBuffers<T> take_forward(Arena& arena, Arena& packed, Arena& saved, const Shape& s, const FestinaCall& call) {
  ForwardBuffers<T> b{};
  b.packed = take_packed<T>(packed, s);
  if (call.pass == FESTINA_TRAINING) {
    b.saved = take_saved<T>(saved, s, call.has_zoneout_cell);
    b.v[0] = b.saved.v[0], b.v[1] = b.saved.v[1], b.means = b.saved.means;
  } else {
    b.means = take_means<T>(arena, s);
    b.v[0] = arena.take_blocked<T>(s.columns(), s.projected_slots());
    if (s.traits.sides == 2) b.v[1] = arena.take_blocked<T>(s.columns(), s.B);
  }
  for (int parity = 0; parity < 2; ++parity) {
    b.h[parity] = arena.take_blocked<T>(s.width, s.B);
    if (s.traits.has_c) b.c[parity] = arena.take_blocked<T>(s.units, s.B);
  }
  if (s.is_projected) b.unprojected = arena.take_blocked<T>(s.units, s.B);
  return b;
}

template <class T> struct Forward {
  const FestinaCall& call;
  const Shape& s;
  const Kernels<T>& kernels;
  const Part& part;
  const Scratch<T>& my;
  const ForwardBuffers<T>& b;
  Order order;
  Zoneout<T> zone_h, zone_c;
  long first, end, first_wide, end_wide;  // this thread's chunks of H and of P
  long projected = 0;                     // rows whose products with x still lack their norms
  bool is_training;

  Forward(const FestinaCall& call, const Shape& s, const Kernels<T>& kernels, const Part& part, const Scratch<T>& my,
          const ForwardBuffers<T>& b, const long* starts, long d)
      : call(call), s(s), kernels(kernels), part(part), my(my), b(b), order{s, starts, d, part.row, part.end_row},
        zone_h(zoneout_h<T>(s, call, d)), zone_c(zoneout_c<T>(s, call, d)), first(part.first(s.units)),
        end(part.end(s.units)), first_wide(part.first(s.width)), end_wide(part.end(s.width)),
        is_training(call.pass == FESTINA_TRAINING) {}

  void run() {
    for (long r = 0; r < part.end_row - part.row; ++r) enter(r, 0, false);
    long most = order.rows(order.d == 0 ? 0 : s.T - 1);
    for (long r = most; r < part.end_row - part.row; ++r) leave(r, 0);
    join(0);
    part.wait();
    for (long step = 0; step < s.T;) {
      long stop = step, list = 0;
      while (stop < s.T && (list == 0 || list + order.rows(stop) <= projected_rows)) list += order.rows(stop++);
      project(step, stop);
      for (long index = 0; step < stop; index += order.rows(step++)) advance(step, index);
    }
  }

  long slot(long step, long index) const { return is_training ? order.token(step) : part.group * s.projected() + part.row + index; }

  // The state before the first step of a row, in the buffers that the step reads.
  void enter(long r, long step, bool is_reset) {
    long row = part.row + r, at = order.d * s.B + row;
    Tensor<T> h_0(call.h_0, call.type), c_0(call.c_0, call.type);
    h_0.read(at * s.P, s.P, first_wide, end_wide, b.h[step % 2], row);
    if (s.traits.has_c) c_0.read(at * s.H, s.H, first, end, b.c[step % 2], row);
    if (is_reset) clear(row, step);
  }

  void clear(long row, long step) {
    clear_row(b.h[step % 2], first_wide, end_wide, row);
    if (s.traits.has_c) clear_row(b.c[step % 2], first, end, row);
  }

  bool is_reset(long step, long r) const {
    return call.resets && call.resets[order.d * s.N + order.token(step) + r];
  }

  // Rows whose first step this is.
  void join(long step) {
    for (long r = order.rows(step - 1); r < order.rows(step); ++r) enter(r, step, is_reset(step, r));
  }

  void leave(long r, long step) {
    long row = part.row + r, at = order.d * s.B + row;
    Tensor<T> h_n(call.h_n, call.type), c_n(call.c_n, call.type);
    h_n.write(at * s.P, s.P, first_wide, end_wide, b.h[step % 2], row);
    if (s.traits.has_c) c_n.write(at * s.H, s.H, first, end, b.c[step % 2], row);
  }

  // The products with x of steps [step, stop).
  void project(long step, long stop) {
    bool is_normed = s.traits.is_normed[0] && call.placement == FESTINA_SEPARATE;
    Tensor<T> input(call.input, call.type);
    long count = 0;
    for (long index = 0; step < stop; ++step)
      for (long r = 0, rows = order.rows(step); r < rows; ++r, ++index, ++count) {
        long token = order.token(step) + r;
        my.left_at[count] = input.is_bfloat16 ? count * s.depth(s.I) : token * s.I;
        my.target_at[count] = (slot(step, index - r) + r) * chunk<T>;
        if (input.is_bfloat16) take_input(token, my.rows + my.left_at[count]);
      }
    bool has_inner = call.parameters[order.d][FESTINA_BIAS_INNER];
    long column = first * s.traits.gates, columns = (end - first) * s.traits.gates;
    Target<T> to{b.v[0].at(column, 0), my.target_at, b.v[0].step()};
    if (has_inner) fill(to, count, columns, b.packed.inner + column * chunk<T>);
    const T* left = input.is_bfloat16 ? my.rows : (const T*)call.input;
    long depth = s.depth(s.I), panel = depth * chunk<T>;
    with_factor<T>(s.is_paired, Two{}, T{}, [&](auto e) {
      using E = decltype(e);
      multiply<E>({(const E*)left, my.left_at, chunk<E>}, count, {(const E*)b.packed.input + column * panel, panel}, columns,
                  depth, to, has_inner, squares(is_normed, 0, count));
    });
    if (is_normed) projected = count;
  }

  // A step of a bfloat16 input as the product takes it.
  void take_input(long token, T* to) const {
    const uint16_t* from = (const uint16_t*)call.input + token * s.I;
    if (!s.is_paired) {
      for (long k = 0; k < s.I; ++k) to[k] = (T)from_bfloat16(from[k]);
      return;
    }
    Half* pairs = (Half*)to;
    pairs[2 * s.depth(s.I) - 1] = 0;  // an odd last term has no other
    for (long k = 0; k < s.I; ++k) pairs[k] = from[k];
  }

  // The product with h of one step.
  void multiply_h(long step, long index) {
    if (s.traits.is_diagonal) return;
    long rows = order.rows(step), at = slot(step, index);
    Blocked<T> h_old = from_row(b.h[step % 2], part.row);
    Blocked<T> to = s.traits.sides == 1 ? from_row(b.v[0], at) : from_row(b.v[1], is_training ? at : part.row);
    long column = first * s.traits.gates, columns = (end - first) * s.traits.gates;
    long depth = s.depth(s.P), panel = depth * chunk<T>;
    if constexpr (can_pair<T>)
      for (long n = 0; s.is_paired && n < s.width; ++n)
        for (long r = 0; r < rows; ++r) narrow(h_old, n, r, my.pairs, r);
    with_factor<T>(s.is_paired, my.pairs, h_old, [&](auto left) {
      using E = typename decltype(left)::Element;
      multiply<E>({left.data, my.chunk_at, left.step()}, rows, {(const E*)b.packed.recurrent + column * panel, panel}, columns,
                  depth, {to.at(column, 0), my.chunk_at, to.step()}, s.traits.sides == 1, squares(is_normed_h(), 1, rows));
    });
  }

  bool is_joint() const { return s.traits.sides == 1 && s.traits.is_normed[0] && !s.traits.is_diagonal; }
  bool is_normed_h() const { return is_joint() || s.traits.is_normed[1]; }

  // Cleared sums of squares of one side, gate by gate, where a norm needs them.
  Squares<T> squares(bool is_normed, int side, long rows) const {
    if (!is_normed) return {};
    for (int g = 0; g < s.traits.gates; ++g) my.sums.clear(side * max_gates + g, rows);
    return {my.sums.at(side * max_gates), my.sums.at(1) - my.sums.own, s.traits.gates, 0, 0};
  }

  // Norms of the products that were made since the last step: of x for several steps at once, of h for `rows`.
  void normalise(long rows, T* scale_h) {
    long count[2] = {projected, is_normed_h() ? rows : 0};
    projected = 0;
    if (!count[0] && !count[1]) return;
    for (int side = 0; side < 2; ++side)
      for (int g = 0; g < s.traits.gates; ++g) my.sums.publish(side * max_gates + g, count[side]);
    part.wait();
    for (int side = 0; side < 2; ++side)
      for (long r = 0; r < count[side]; ++r)
        finish_norm(s, part, my.sums, side, call.eps, r, (side ? scale_h : my.scale[0]) + r * max_gates);
  }

  static void fill(Target<T> to, long rows, long chunks, const T* value) {
    for (long n = 0; n < chunks; ++n)
      for (long r = 0; r < rows; ++r)
        for (int l = 0; l < chunk<T>; ++l) to.data[to.row_at[r] + n * to.step + l] = value[n * chunk<T> + l];
  }

  // One step; `index` is where its rows begin in the list of projected rows.
  void advance(long step, long index) {
    long rows = order.rows(step), at = slot(step, index), now = step % 2;
    Blocked<T> v_x = from_row(b.v[0], at), v_h = from_row(b.v[1], is_training ? at : part.row);
    T* scale_x = my.scale[0] + index * max_gates;
    multiply_h(step, index);
    normalise(rows, is_joint() ? scale_x : my.scale[1]);

    Step<T> p{};
    p.rows = rows, p.first = first, p.end = end;
    p.v[0] = v_x, p.v[1] = v_h;
    p.scale[0] = scale_x, p.scale[1] = my.scale[1];
    p.vectors = b.packed.vectors, p.mean_c = my.mean_c, p.scale_c = my.scale_c;
    p.h_old = from_row(b.h[now], part.row), p.h = from_row(s.is_projected ? b.unprojected : b.h[1 - now], part.row);
    p.c_old = from_row(b.c[now], part.row), p.c = from_row(b.c[1 - now], part.row);
    p.c_raw = from_row(b.saved.c, at);
    p.sums = my.sums.own, p.sum_rows = my.sums.rows;
    if (s.traits.has_norm_c) {
      my.sums.clear(sum_of_c, rows);
      kernels.update(p);
      norm_c(s, part, my.sums, call, p.c, b.packed.vectors, rows, my.mean_c, my.scale_c);
    }
    kernels.emit(p);
    if (s.is_projected) {
      part.wait();
      Blocked<T> to = from_row(b.h[1 - now], part.row);
      multiply<T>({p.h.data, my.chunk_at, p.h.step()}, rows,
                  {b.packed.projection + first_wide * s.H * chunk<T>, s.H * chunk<T>}, end_wide - first_wide, s.H,
                  {to.at(first_wide, 0), my.chunk_at, to.step()}, false);
    }
    if (is_training && part.member == 0) keep_sums(step, rows, scale_x);
    settle(step);
    join(step + 1);
    if (step + 1 < s.T) part.wait();
  }

  void keep_sums(long step, long rows, const T* scale_x) {
    long token = order.token(step);
    for (int side = 0; side < 2; ++side) {
      const T* scale = side ? my.scale[1] : scale_x;
      for (int g = 0; s.traits.is_normed[side] && g < s.traits.gates; ++g)
        for (long r = 0; r < rows; ++r)
          *saved_sum(s, b.saved, sums_before(s, side) + s.group_of[g], token + r) = scale[r * max_gates + g];
    }
    for (long r = 0; s.traits.has_norm_c && r < rows; ++r) {
      *saved_sum(s, b.saved, sums_before_c(s), token + r) = my.mean_c[r];
      *saved_sum(s, b.saved, sums_before_c(s) + 1, token + r) = my.scale_c[r];
    }
  }

  // From the cell's new state to what is seen outside and what the next step starts from.
  void settle(long step) {
    long now = step % 2, token = order.token(step);
    Tensor<T> output(call.output, call.type);
    Blocked<T> h = b.h[1 - now], c = b.c[1 - now];
    for (long r = 0, rows = order.rows(step); r < rows; ++r) {
      long row = part.row + r;
      if (zone_h.is_active) zone_h.apply(token + r, first_wide, end_wide, b.h[now], h, row);
      if (s.traits.has_c && zone_c.is_active) {
        zone_c.apply(token + r, first, end, b.c[now], c, row);
        if (is_training) copy_row(c, row, b.saved.carried, token + r, first, end);
      }
      long to = ((token + r) * s.directions + order.d) * s.P;
      output.write(to, s.P, first_wide, end_wide, h, row);
      if (output.is_bfloat16) output.read(to, s.P, first_wide, end_wide, h, row);
      if (r >= order.rows(step + 1))
        leave(r, step + 1);
      else if (is_reset(step + 1, r))
        clear(row, step + 1);
    }
  }
};

}  // namespace ISA
