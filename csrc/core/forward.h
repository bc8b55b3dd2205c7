// The forward pass over time, the same for all cells and plans: they differ in the kernels that it is given.
#pragma once
#include "recurrence.h"

namespace ISA {

// State and products of one direction, shared by all threads. h and c alternate between two buffers, so that a thread may
// write the new state while another still reads the old one.
template <class E> struct ForwardBuffers {
  Panels<E> panels;
  Saved<E> saved;
  Blocked<E> h[2], c[2], unprojected, gated_h;
  Blocked<E> v[2];  // inference: products of the steps at hand
};

template <class E>
ForwardBuffers<E> take_forward(Arena& arena, Arena& panels, Arena& saved, const Shape& s, const FestinaCall& call) {
  ForwardBuffers<E> b{};
  b.panels = take_panels<E>(panels, s);
  if (call.pass == FESTINA_TRAINING) {
    b.saved = take_saved<E>(saved, s, call.has_zoneout_cell);
    b.v[0] = b.saved.v[0], b.v[1] = b.saved.v[1];
  } else {
    b.v[0] = arena.take_blocked<E>(s.columns(), s.product_buffer_rows());
    if (s.traits.sides == 2) b.v[1] = arena.take_blocked<E>(s.columns(), s.B);
  }
  for (int parity = 0; parity < 2; ++parity) {
    b.h[parity] = arena.take_blocked<E>(s.P_chunks, s.B);
    if (s.traits.has_inner()) b.c[parity] = arena.take_blocked<E>(s.H_chunks, s.B);
  }
  if (s.is_projected) b.unprojected = arena.take_blocked<E>(s.H_chunks, s.B);
  if (s.traits.has_gated_h) b.gated_h = arena.take_blocked<E>(s.P_chunks, s.B);
  return b;
}

template <class E> struct Forward {
  const FestinaCall& call;
  const Shape& s;
  const Kernels<E>& kernels;
  const Part& part;
  const Scratch<E>& my;
  const ForwardBuffers<E>& b;
  Order order;
  Zoneout<E> zone_h, zone_c;
  long first, end, first_P, end_P;  // this thread's chunks of H and of P
  long unnormalized = 0;            // rows whose input products still lack their norms
  bool is_training;

  Forward(const FestinaCall& call, const Shape& s, const Kernels<E>& kernels, const Part& part, const Scratch<E>& my,
          const ForwardBuffers<E>& b, const long* starts, long d)
      : call(call), s(s), kernels(kernels), part(part), my(my), b(b), order{s, starts, d, part.row, part.end_row},
        zone_h(zoneout_h<E>(s, call, d)), zone_c(zoneout_c<E>(s, call, d)), first(part.first(s.H_chunks)),
        end(part.end(s.H_chunks)), first_P(part.first(s.P_chunks)), end_P(part.end(s.P_chunks)),
        is_training(call.pass == FESTINA_TRAINING) {}

  // True if the call is to end.
  bool run() {
    for (long r = 0; r < part.end_row - part.row; ++r) load_state(r, 0, false);
    long most = order.rows(order.d == 0 ? 0 : s.T - 1);
    for (long r = most; r < part.end_row - part.row; ++r) store_state(r, 0);
    start_rows(0);
    part.wait();
    for (long t = 0; t < s.T;) {
      long stop = t, rows = 0;
      while (stop < s.T && (rows == 0 || rows + order.rows(stop) <= input_product_rows)) rows += order.rows(stop++);
      input_product(t, stop);
      for (long index = 0; t < stop; index += order.rows(t++))
        if (step(t, index)) return true;
    }
    return false;
  }

  // The row of the products at which those of step t begin.
  long product_row(long t, long index) const {
    return is_training ? order.token(t) : part.team * s.product_rows() + part.row + index;
  }

  // Copies a row's initial state to the buffers that its first step, t, reads.
  void load_state(long r, long t, bool is_reset) {
    long row = part.row + r, at = order.d * s.B + row;
    Tensor<E> h_0(call.h_0, call.type), c_0(call.c_0, call.type);
    h_0.read(at * s.P, s.P, first_P, end_P, b.h[t % 2], row);
    if (s.traits.has_c) c_0.read(at * s.H, s.H, first, end, b.c[t % 2], row);
    if (is_reset) clear(row, t);
  }

  void clear(long row, long t) {
    clear_row(b.h[t % 2], first_P, end_P, row);
    if (s.traits.has_c) clear_row(b.c[t % 2], first, end, row);
  }

  // Rows whose first step this is.
  void start_rows(long t) {
    for (long r = order.rows(t - 1); r < order.rows(t); ++r) load_state(r, t, order.is_reset(call, t, r));
  }

  void store_state(long r, long t) {
    long row = part.row + r, at = order.d * s.B + row;
    Tensor<E> h_n(call.h_n, call.type), c_n(call.c_n, call.type);
    h_n.write(at * s.P, s.P, first_P, end_P, b.h[t % 2], row);
    if (s.traits.has_c) c_n.write(at * s.H, s.H, first, end, b.c[t % 2], row);
  }

  // The input products of a segment, steps [t, stop).
  void input_product(long t, long stop) {
    bool is_normed = s.traits.is_normed[0] && call.placement == FESTINA_SEPARATE;
    Tensor<E> input(call.input, call.type);
    long count = 0;
    for (long index = 0; t < stop; ++t)
      for (long r = 0, rows = order.rows(t); r < rows; ++r, ++index, ++count) {
        long token = order.token(t) + r;
        my.left_at[count] = input.is_narrow ? count * s.depth(s.I) : token * s.I;
        my.target_at[count] = (product_row(t, index - r) + r) * chunk<E>;
        if (input.is_narrow) read_input(token, my.rows + my.left_at[count]);
      }
    long column = first * s.traits.gates, columns = (end - first) * s.traits.gates;
    Target<E> to{b.v[0].at(column, 0), my.target_at, b.v[0].stride()};
    const E* left = input.is_narrow ? my.rows : (const E*)call.input;
    bool is_begun = begin(0, 0, {left, my.left_at, chunk<E>}, count, to, column, columns, 1);
    long depth = s.depth(s.I), panel = s.panel_rows(s.I) * chunk<E>;
    with_factor<E>(s.is_paired, Two{}, E{}, [&](auto e) {
      using F = decltype(e);
      Squares<E> sums = squares(is_normed, 0, count);
      with_word<F>([&](auto w) {
        using W = decltype(w);
        part.in_pieces(columns, s.traits.gates, count * depth * chunk<E>, [&](long n, long some) {
          multiply<F, 1, W>({(const F*)left, my.left_at, chunk<F>}, count, right<W>(b.panels.input, panel, column + n, 1), some,
                            depth, {to.data + n * to.stride, to.row_at, to.stride}, is_begun, sums);
        });
      });
    });
    if (is_normed) unnormalized = count;
    part.look(count * columns * chunk<E> * depth);
  }

  // Calls body with the type that weights are kept in, for factors of type F.
  template <class F, class Body> void with_word(Body body) const {
    if constexpr (terms<F, Four> > 1) {
      if (s.panel_type == FESTINA_INT8_PANELS) return body(Four{});
      if (s.panel_type == FESTINA_BFLOAT16_PANELS) return body(Two{});
    }
    body(F{});
  }

  // The panel of one column chunk and those that lie `apart` columns from each other.
  template <class W> Right<W> right(const E* panels, long panel, long column, long apart) const {
    return {(const W*)(panels + column * panel + s.scale_rows() * chunk<E>), apart * panel};
  }

  // What a product begins with: the bias inside its norm, and less the mean that rounded weights leave in it. `which` is 0 for
  // the input product, 1 for the recurrent one; it goes to one side, to `count` columns from `column` on that lie `apart`. True
  // if the product is to be added to what is there.
  bool begin(int which, int side, Left<E> left, long rows, Target<E> to, long column, long count, long apart) const {
    long gates = s.traits.gates, terms = which ? s.P : s.I;
    bool is_there = which != side, has_inner = !is_there && has_inner_bias(s, call.parameters[order.d], side);
    const E* bias = has_inner ? b.panels.inner[side] + column * chunk<E> : nullptr;
    const E* means = !s.is_rounded() ? nullptr : which ? b.panels.means.recurrent : b.panels.means.input;
    if (!bias && !means) return is_there;
    E* less = my.correction[side];
    for (long r = 0; r < rows; ++r) {
      E of_group[max_gates];
      for (int group = 0; means && group < s.groups; ++group) of_group[group] = dot(left, r, means + group * terms, terms);
      for (int g = 0; g < gates; ++g) {
        bool is_centred = means && (which == 0 || g < s.traits.centred_gates());
        less[r * max_gates + g] = is_centred ? of_group[s.group_of[g]] : E(0);
      }
    }
    for (long n = 0; n < count; ++n) {
      long at = column + n * apart;
      const E* is_unit = b.panels.vectors + (at / gates * vectors_a_chunk + valid) * chunk<E>;  // 0 past H, as products are
      for (long r = 0; r < rows; ++r) {
        E *start = to.data + to.row_at[r] + n * to.stride, mean = less[r * max_gates + at % gates];
        for (int l = 0; l < chunk<E>; ++l)
          start[l] = (is_there ? start[l] : E(0)) + (bias ? bias[n * apart * chunk<E> + l] : E(0)) - mean * is_unit[l];
      }
    }
    return true;
  }

  // One row of a narrow input as the product takes it.
  void read_input(long token, E* to) const {
    if (!s.is_paired) {
      Tensor<E> input(call.input, call.type);
      long k = 0, at = token * s.I;
      for (; k + chunk<E> <= s.I; k += chunk<E>) input.get_chunk(at + k, to + k);
      for (; k < s.I; ++k) to[k] = input.get(at + k);
      return;
    }
    const Half* from = (const Half*)call.input + token * s.I;
    Half* pairs = (Half*)to;
    pairs[2 * s.depth(s.I) - 1] = 0;  // an odd last term is paired with zero
    for (long k = 0; k < s.I; ++k) pairs[k] = from[k];
  }

  // Gates [from, to) of the recurrent product of one step, which takes in `h`.
  void recurrent_product(long t, long index, Blocked<E> h, int from, int to) {
    if (s.traits.is_diagonal) return;
    long rows = order.rows(t), at = product_row(t, index);
    long gates = s.traits.gates, depth = s.depth(s.P), panel = s.panel_rows(s.P) * chunk<E>;
    if constexpr (can_pair<E>)
      for (long n = 0; s.is_paired && n < s.P_chunks; ++n)
        for (long r = 0; r < rows; ++r) narrow(h, n, r, my.pairs, r);
    // To one side, `count` columns from `column` on that lie `apart`; squares are summed apart for `period` successive ones.
    auto product = [&](int side, long column, long count, long apart, long period, Squares<E> sums) {
      Blocked<E> of_side = side == 0 ? from_row(b.v[0], at) : from_row(b.v[1], is_training ? at : part.row);
      Target<E> to{of_side.at(column, 0), my.chunk_at, apart * of_side.stride()};
      bool is_begun = begin(1, side, {h.data, my.chunk_at, h.stride()}, rows, to, column, count, apart);
      with_factor<E>(s.is_paired, my.pairs, h, [&](auto left) {
        using F = typename decltype(left)::Element;
        with_word<F>([&](auto w) {
          using W = decltype(w);
          part.in_pieces(count, period, rows * depth * chunk<E>, [&](long n, long some) {
            multiply<F, 1, W>({left.data, my.chunk_at, left.stride()}, rows,
                              right<W>(b.panels.recurrent, panel, column + n * apart, apart), some, depth,
                              {to.data + n * to.stride, to.row_at, to.stride}, is_begun, sums);
          });
        });
      });
    };
    Squares<E> sums = squares(is_normed_h(), 1, rows);
    if (!s.traits.has_split_sum() && to - from == gates)
      return product(s.traits.sides - 1, first * gates, (end - first) * gates, 1, gates, sums);
    for (long g = from; g < to; ++g) {
      bool is_apart = s.traits.has_split_sum() && g == gates - 1, is_summed = s.traits.has_split_sum() && !is_apart;
      Squares<E> of_gate{sums.data + g * sums.stride, sums.stride, 1, 0, 0};
      product(is_summed ? 0 : s.traits.sides - 1, first * gates + g, end - first, gates, 1, is_apart ? Squares<E>{} : of_gate);
    }
  }

  // A norm takes in the sum of both products.
  bool is_joint() const { return s.traits.is_normed[0] && !s.traits.is_normed[1] && !s.traits.is_diagonal; }
  bool is_normed_h() const { return is_joint() || s.traits.is_normed[1]; }

  // Cleared sums of squares of one side, gate by gate, if a norm needs them.
  Squares<E> squares(bool is_normed, int side, long rows) const {
    if (!is_normed) return {};
    for (int g = 0; g < s.traits.gates; ++g) my.sums.clear(side * max_gates + g, rows);
    return {my.sums.at(side * max_gates), my.sums.at(1) - my.sums.own, s.traits.gates, 0, 0};
  }

  // 1 / sigma of the products since the last call: input products of a whole segment, and gates [from, to) of the recurrent
  // ones of `rows` rows.
  void finish_norms(long rows, E* scale_h, int from, int to) {
    long count[2] = {unnormalized, is_normed_h() ? rows : 0};
    unnormalized = 0;
    if (!count[0] && !count[1]) return;
    const int first_gate[2] = {0, from}, end_gate[2] = {s.traits.gates, to};
    for (int side = 0; side < 2; ++side)
      for (int g = first_gate[side]; g < end_gate[side]; ++g) my.sums.publish(side * max_gates + g, count[side]);
    part.wait();
    for (int side = 0; side < 2; ++side)
      for (long r = 0; r < count[side]; ++r)
        finish_norm(s, part, my.sums, side, first_gate[side], end_gate[side], call.eps, r,
                    (side ? scale_h : my.scale[0]) + r * max_gates);
  }

  // Step t, whose rows begin at `index` within the segment. True if the call is to end.
  bool step(long t, long index) {
    long rows = order.rows(t), at = product_row(t, index), now = t % 2;
    Blocked<E> v_x = from_row(b.v[0], at), v_h = from_row(b.v[1], is_training ? at : part.row);
    E *scale_x = my.scale[0] + index * max_gates, *scale_h = is_joint() ? scale_x : my.scale[1];
    int gates = s.traits.gates, plain = s.traits.plain_gates();
    recurrent_product(t, index, from_row(b.h[now], part.row), 0, plain);
    finish_norms(rows, scale_h, 0, plain);

    CellStep<E> p{};
    p.rows = rows, p.first = first, p.end = end;
    p.v[0] = v_x, p.v[1] = v_h;
    p.scale[0] = scale_x, p.scale[1] = my.scale[1];
    p.vectors = b.panels.vectors, p.mean_c = my.mean_c, p.scale_c = my.scale_c, p.clip = clip_of<E>(call);
    p.h_old = from_row(b.h[now], part.row), p.h = from_row(s.is_projected ? b.unprojected : b.h[1 - now], part.row);
    p.c_old = from_row(b.c[now], part.row), p.c = from_row(b.c[1 - now], part.row);
    p.c_raw = from_row(b.saved.c, at), p.gated_h = from_row(b.gated_h, part.row);
    p.sums = my.sums.own, p.sum_rows = my.sums.rows;
    if (s.traits.has_norm_c) {
      my.sums.clear(sum_of_c, rows);
      kernels.update(p);
      norm_c(s, part, my.sums, call, p.c, b.panels.vectors, rows, my.mean_c, my.scale_c);
    }
    if (s.traits.has_gated_h) {
      kernels.update(p);
      part.wait();
      recurrent_product(t, index, p.gated_h, plain, gates);
      finish_norms(rows, scale_h, plain, gates);
    }
    kernels.emit(p);
    if (s.is_projected) {
      part.wait();
      Blocked<E> to = from_row(b.h[1 - now], part.row);
      with_word<E>([&](auto w) {
        using W = decltype(w);
        multiply<E, 1, W>({p.h.data, my.chunk_at, p.h.stride()}, rows,
                          right<W>(b.panels.projection, s.projection_rows() * chunk<E>, first_P, 1), end_P - first_P, s.H,
                          {to.at(first_P, 0), my.chunk_at, to.stride()}, false);
      });
    }
    if (is_training && part.member == 0) keep_sums(t, rows, scale_x);
    finish_step(t);
    start_rows(t + 1);
    part.look(s.work(rows) / part.members);
    return t + 1 < s.T && part.wait();
  }

  void keep_sums(long t, long rows, const E* scale_x) {
    long token = order.token(t);
    for (int side = 0; side < 2; ++side) {
      const E* scale = side ? my.scale[1] : scale_x;
      for (int g = 0; s.traits.is_normed[side] && g < s.traits.gates; ++g)
        for (long r = 0; r < rows; ++r)
          *saved_sum(s, b.saved, sums_before(s, side) + s.group_of[g], token + r) = scale[r * max_gates + g];
    }
    for (long r = 0; s.traits.has_norm_c && r < rows; ++r) {
      *saved_sum(s, b.saved, sums_before_c(s), token + r) = my.mean_c[r];
      *saved_sum(s, b.saved, sums_before_c(s) + 1, token + r) = my.scale_c[r];
    }
  }

  // From the cell's new state to the output and the state that the next step starts from: Zoneout, stores, resets.
  void finish_step(long t) {
    long now = t % 2, token = order.token(t);
    Tensor<E> output(call.output, call.type);
    Blocked<E> h = b.h[1 - now], c = b.c[1 - now];
    for (long r = 0, rows = order.rows(t); r < rows; ++r) {
      long row = part.row + r;
      if (zone_h.is_active) zone_h.apply(token + r, first_P, end_P, b.h[now], h, row);
      if (s.traits.has_c && zone_c.is_active) {
        zone_c.apply(token + r, first, end, b.c[now], c, row);
        if (is_training) copy_row(c, row, b.saved.carried, token + r, first, end);
      }
      long to = ((token + r) * s.directions + order.d) * s.P;
      output.write(to, s.P, first_P, end_P, h, row);
      if (output.is_narrow) output.read(to, s.P, first_P, end_P, h, row);
      if (r >= order.rows(t + 1))
        store_state(r, t + 1);
      else if (order.is_reset(call, t + 1, r))
        clear(row, t + 1);
    }
  }
};

}  // namespace ISA
