// The kernels: a cell's arithmetic with its norms over rows x chunks of H, forward and backward. Everything that depends on
// the cell or its plan is decided here at compile time.
#pragma once
#include "cells.h"
#include "shape.h"

namespace ISA {

constexpr double infinity = __builtin_inf();

template <class E> E clip_of(const FestinaCall& call) { return call.clip != 0 ? (E)call.clip : (E)infinity; }

// The operands of a cell step. Rows count from the first of the part.
template <class E> struct CellStep {
  long rows, first, end;  // chunks [first, end) of H
  Blocked<E> v[2];        // products, from this step's first row on
  const E* scale[2];      // [rows, max_gates]: 1 / sigma
  const E *vectors, *mean_c, *scale_c;
  E clip;  // infinity: none
  Blocked<E> h_old, h, c_old, c, c_raw;
  E* sums;  // [sum, sum_rows, lanes]: sums over a row's hidden units
  long sum_rows;

  // Backward: gradients of the new h and c, and of the old ones, which may be the same memory: a chunk is read before it is
  // written. If Zoneout kept part of the old state, its gradient is there already and is added to.
  Blocked<E> d_v[2], d_h_new, d_h, d_c_new, d_c, d_c_hat;
  bool is_h_kept, is_c_kept;
  E* d_vectors;
  Blocked<E> gated_h, d_gated_h;        // backward makes the gated h again
  const E *d_c_hat_mean, *d_c_hat_dot;  // [rows]: means of d_c_hat and of d_c_hat * c_hat, see update_backward
};

template <class E, class Cell, int placement, int cell_norm> struct Pointwise {
  static constexpr bool is_normed[2] = {placement != FESTINA_NO_NORM, placement == FESTINA_SEPARATE && !Cell::is_diagonal};
  static constexpr int sides = !Cell::is_diagonal && (placement == FESTINA_SEPARATE || Cell::has_split_candidate) ? 2 : 1;
  static constexpr int gates = Cell::gates, split = Cell::emit_from;
  static constexpr bool has_norm_c = cell_norm != FESTINA_NO_CELL_NORM;
  static constexpr int emitted = has_norm_c || Cell::has_gated_h ? split : 0;  // the first gate that `update` leaves to `emit`
  static constexpr Traits traits{
      gates,      sides, Cell::has_c,      Cell::has_split_candidate, Cell::is_diagonal, {is_normed[0], is_normed[1]},
      has_norm_c, false, Cell::has_gated_h};
  using V = Span<E>;

  // Pointers to one chunk of H in every operand, taken once for all rows: addresses computed at each access were half of a
  // kernel's instructions.
  struct Chunk {
    const CellStep<E>& s;
    E *v[2][gates], *d_v[2][gates], *h_old, *h, *c_old, *c, *c_raw, *d_h_new, *d_h, *d_c_new, *d_c, *d_c_hat, *d_vectors;
    E *gated_h, *d_gated_h;
    const E* vectors;

    INLINE Chunk(const CellStep<E>& s, long n) : s(s) {
      auto of = [&](const Blocked<E>& m) { return m.at(n, 0); };
      for (int side = 0; side < sides; ++side)
        for (int g = 0; g < gates; ++g) {
          v[side][g] = s.v[side].at(n * gates + g, 0);
          d_v[side][g] = s.d_v[side].at(n * gates + g, 0);
        }
      h_old = of(s.h_old), h = of(s.h), c_old = of(s.c_old), c = of(s.c), c_raw = of(s.c_raw);
      d_h_new = of(s.d_h_new), d_h = of(s.d_h), d_c_new = of(s.d_c_new), d_c = of(s.d_c), d_c_hat = of(s.d_c_hat);
      gated_h = of(s.gated_h), d_gated_h = of(s.d_gated_h);
      vectors = s.vectors + n * vectors_a_chunk * chunk<E>, d_vectors = s.d_vectors + n * vectors_a_chunk * chunk<E>;
    }
  };

  // One span of numbers: a chunk, a row, and the lane of the chunk at which it begins.
  struct Place : Chunk {
    long row;
    int lane;
    INLINE Place(const Chunk& chunk, long row, int lane) : Chunk(chunk), row(row), lane(lane) {}
    INLINE E* in(E* column) const { return column + row * chunk<E> + lane; }
    INLINE const E* vector(int which) const { return this->vectors + which * chunk<E> + lane; }
    INLINE E* d_vector(int which) const { return this->d_vectors + which * chunk<E> + lane; }
    INLINE E* sum(int which) const { return this->s.sums + (which * this->s.sum_rows + row) * lanes<E>; }
  };

  template <class Body> static INLINE void each(const CellStep<E>& s, Body body) {
    for (long n = s.first; n < s.end; ++n) {
      Chunk at(s, n);
      for (long row = 0; row < s.rows; ++row)
#pragma GCC unroll 2
        for (int lane = 0; lane < chunk<E>; lane += V::span) body(Place(at, row, lane));
    }
  }

  static INLINE V normalized(const Place& at, int side, int gate) {
    return load_as<V>(at.in(at.v[side][gate])) * at.s.scale[side][at.row * max_gates + gate];
  }

  static INLINE V side_of(const Place& at, int side, int gate) {
    V shift = load_as<V>(at.vector(shift_of(side, gate)));
    if (!is_normed[side]) return load_as<V>(at.in(at.v[side][gate])) + shift;
    return normalized(at, side, gate) * load_as<V>(at.vector(gain_of(side, gate))) + shift;
  }

  template <int from, int to> static INLINE void pre_activations(const Place& at, V* a) {
#pragma GCC unroll 4
    for (int g = from; g < to; ++g) {
      a[g] = side_of(at, 0, g);
      if constexpr (Cell::is_diagonal) a[g] += load_as<V>(at.vector(diagonal)) * load_as<V>(at.in(at.h_old));
      if constexpr (sides == 2) {
        if (Cell::has_split_candidate && g == gates - 1)
          a[gates] = side_of(at, 1, g);
        else
          a[g] += side_of(at, 1, g);
      }
    }
  }

  // To c, if it is normalised: its norm needs the whole row before `emit`. Or to the gated h: so does its product.
  static void update(const CellStep<E>& s) {
    if constexpr (has_norm_c) {
      each(s, [&](const Place& at) __attribute__((always_inline)) {
        V a[gates + 1];
        pre_activations<0, split>(at, a);
        V c = Cell::update(a, load_as<V>(at.in(at.c_old)));
        if (s.c_raw.data) store(at.in(at.c_raw), c);
        if (cell_norm == FESTINA_READOUT) c = clipped(s, c);
        store(at.in(at.c), c);
        add_to(at.sum(sum_of_c), fold(c));
      });
    } else if constexpr (Cell::has_gated_h) {
      each(s, [&](const Place& at) __attribute__((always_inline)) {
        V a[gates + 1];
        pre_activations<0, split>(at, a);
        store(at.in(at.gated_h), Cell::update(a, load_as<V>(at.in(at.h_old))));
      });
    }
  }

  static INLINE V clipped(const CellStep<E>& s, V c) { return s.clip < infinity ? clamp(c, -s.clip, s.clip) : c; }

  // The gradient of what was clipped: none beyond the clip.
  static INLINE V clipped_backward(const CellStep<E>& s, V c, V d) {
    if (!(s.clip < infinity)) return d;
    V none = broadcast_as<V>(0);
    return where_at_most(c, s.clip, where_at_most(-c, s.clip, d, none), none);
  }

  // The c that its norm takes in, without gain and shift.
  static INLINE V c_hat(const Place& at, V c) {
    return ((cell_norm == FESTINA_READOUT ? clipped(at.s, c) : c) - at.s.mean_c[at.row]) * at.s.scale_c[at.row];
  }

  static void emit(const CellStep<E>& s) {
    each(s, [&](const Place& at) __attribute__((always_inline)) {
      V a[gates + 1], inner;
      pre_activations<emitted, gates>(at, a);
      if constexpr (has_norm_c) {
        V hat = c_hat(at, load_as<V>(at.in(at.c)));
        inner = hat * load_as<V>(at.vector(gain_c)) + load_as<V>(at.vector(shift_c));
        if (cell_norm == FESTINA_CARRIED) {
          inner = clipped(s, inner);
          store(at.in(at.c), inner);
        }
      } else if constexpr (Cell::has_c) {
        inner = Cell::update(a, load_as<V>(at.in(at.c_old)));
        if (s.c_raw.data) store(at.in(at.c_raw), inner);
        inner = clipped(s, inner);
        store(at.in(at.c), inner);
      } else {
        inner = load_as<V>(at.in(at.h_old));
      }
      store(at.in(at.h), Cell::emit(a, inner));
    });
  }

  static INLINE void put(bool is_added, E* to, V x) { store(to, is_added ? load_as<V>(to) + x : x); }

  // From the gradients of pre-activations to those of gain, shift and normalised product. Backward of the norm itself needs
  // the row sums taken here, and follows in norm_backward.
  template <int from, int to> static INLINE void spread(const Place& at, const V* d_a) {
#pragma GCC unroll 4
    for (int g = from; g < to; ++g) {
      add_to(at.d_vector(shift_of(0, g)), d_a[g]);
#pragma GCC unroll 2
      for (int side = 0; side < sides; ++side) {
        bool is_split = side == 1 && Cell::has_split_candidate && g == gates - 1;
        V d = is_split ? d_a[gates] : d_a[g];
        if (is_split) add_to(at.d_vector(shift_of(1, g)), d);
        if (is_normed[side]) {
          V hat = normalized(at, side, g);
          add_to(at.d_vector(gain_of(side, g)), d * hat);
          d = d * load_as<V>(at.vector(gain_of(side, g)));
          add_to(at.sum(side * max_gates + g), fold(d * hat));
        }
        store(at.in(at.d_v[side][g]), d);
      }
    }
  }

  static void emit_backward(const CellStep<E>& s) {
    each(s, [&](const Place& at) __attribute__((always_inline)) {
      V a[gates + 1], d_a[gates + 1], d_inner, d_h = load_as<V>(at.in(at.d_h_new));
      pre_activations<emitted, gates>(at, a);
      if constexpr (has_norm_c) {
        V hat = c_hat(at, load_as<V>(at.in(at.c_raw)));
        V gain = load_as<V>(at.vector(gain_c)), c = hat * gain + load_as<V>(at.vector(shift_c));
        Cell::emit_backward(a, cell_norm == FESTINA_CARRIED ? clipped(s, c) : c, d_h, d_a, d_inner);
        if (cell_norm == FESTINA_CARRIED) d_inner = clipped_backward(s, c, d_inner + load_as<V>(at.in(at.d_c_new)));
        add_to(at.d_vector(gain_c), d_inner * hat);
        add_to(at.d_vector(shift_c), d_inner);
        V d_hat = d_inner * gain;
        store(at.in(at.d_c_hat), d_hat);
        add_to(at.sum(sum_of_c), fold(d_hat));
        add_to(at.sum(sum_of_c + 1), fold(d_hat * hat));
      } else if constexpr (Cell::has_c) {
        V c_old = load_as<V>(at.in(at.c_old)), c = load_as<V>(at.in(at.c_raw)), d_c;
        Cell::emit_backward(a, clipped(s, c), d_h, d_a, d_inner);
        Cell::update_backward(a, c_old, clipped_backward(s, c, load_as<V>(at.in(at.d_c_new)) + d_inner), d_a, d_c);
        put(s.is_c_kept, at.in(at.d_c), d_c);
      } else {
        V h_old = load_as<V>(at.in(at.h_old));
        Cell::emit_backward(a, h_old, d_h, d_a, d_inner);
        if constexpr (Cell::is_diagonal) {
          d_inner += d_a[0] * load_as<V>(at.vector(diagonal));
          add_to(at.d_vector(diagonal), d_a[0] * h_old);
        }
        put(s.is_h_kept, at.in(at.d_h), d_inner);
      }
      spread<emitted, gates>(at, d_a);
    });
  }

  static void update_backward(const CellStep<E>& s) {
    if constexpr (has_norm_c) {
      each(s, [&](const Place& at) __attribute__((always_inline)) {
        V a[gates + 1], d_a[gates + 1], d_c;
        pre_activations<0, split>(at, a);
        V raw = load_as<V>(at.in(at.c_raw)), hat = c_hat(at, raw);
        V d_raw = (load_as<V>(at.in(at.d_c_hat)) - s.d_c_hat_mean[at.row] - hat * s.d_c_hat_dot[at.row]) * s.scale_c[at.row];
        if (cell_norm == FESTINA_READOUT) d_raw = clipped_backward(s, raw, d_raw + load_as<V>(at.in(at.d_c_new)));
        Cell::update_backward(a, load_as<V>(at.in(at.c_old)), d_raw, d_a, d_c);
        put(s.is_c_kept, at.in(at.d_c), d_c);
        spread<0, split>(at, d_a);
      });
    } else if constexpr (Cell::has_gated_h) {
      each(s, [&](const Place& at) __attribute__((always_inline)) {
        V a[gates + 1], d_a[gates + 1], d_h, h_old = load_as<V>(at.in(at.h_old));
        pre_activations<0, split>(at, a);
        store(at.in(at.gated_h), Cell::update(a, h_old));
        Cell::update_backward(a, h_old, load_as<V>(at.in(at.d_gated_h)), d_a, d_h);
        put(true, at.in(at.d_h), d_h);
        spread<0, split>(at, d_a);
      });
    }
  }
};

}  // namespace ISA
