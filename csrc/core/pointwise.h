// One step of a cell over rows x units, with its norms: pre-activations from products, the cell, and back. Everything
// that depends on the cell or its plan is decided here at compile time.
#pragma once
#include "cells.h"
#include "shape.h"

namespace ISA {

// What a pass over one step reads and writes. Rows count from the first of the part; units are chunks.
template <class T> struct Step {
  long rows, first, end;
  Blocked<T> v[2];    // products, from this step's first row on
  const T* scale[2];  // [rows, max_gates]: 1 / sigma
  const T *vectors, *mean_c, *scale_c;
  Blocked<T> h_old, h, c_old, c, c_raw;
  T* sums;  // [sum, sum_rows, lanes]: what is summed over the units of a row
  long sum_rows;

  // Backward: gradients of the new h and c, and of the old ones, which may lie in the same place: a chunk is read before
  // it is written. Where Zoneout kept a share of the old state, its gradient is there already and is added to.
  Blocked<T> d_v[2], d_h_new, d_h, d_c_new, d_c, d_seen;
  bool is_h_kept, is_c_kept;
  T* d_vectors;
  const T *mean_d_seen, *mean_d_seen_hat;  // [rows]: what the norm of c takes from its gradient
};

template <class T, class Cell, int placement, int cell_norm> struct Pointwise {
  static constexpr bool is_normed[2] = {placement != FESTINA_NO_NORM, placement == FESTINA_SEPARATE && !Cell::is_diagonal};
  static constexpr int sides = !Cell::is_diagonal && (placement == FESTINA_SEPARATE || Cell::is_parted) ? 2 : 1;
  static constexpr int gates = Cell::gates, split = Cell::emit_from;
  static constexpr bool has_norm_c = cell_norm != FESTINA_NO_CELL_NORM;
  static constexpr Traits traits{gates, sides, Cell::has_c, Cell::is_parted, Cell::is_diagonal,
                                 {is_normed[0], is_normed[1]}, has_norm_c};
  using V = Span<T>;

  // Where one chunk of units begins in everything that a step touches. Taken once for all rows: a kernel has so many
  // matrices that addresses made anew at each access were half of its instructions.
  struct Unit {
    const Step<T>& s;
    T *v[2][gates], *d_v[2][gates], *h_old, *h, *c_old, *c, *c_raw, *d_h_new, *d_h, *d_c_new, *d_c, *d_seen, *d_vectors;
    const T* vectors;

    INLINE Unit(const Step<T>& s, long unit) : s(s) {
      auto of = [&](const Blocked<T>& m) { return m.at(unit, 0); };
      for (int side = 0; side < sides; ++side)
        for (int g = 0; g < gates; ++g) {
          v[side][g] = s.v[side].at(unit * gates + g, 0);
          d_v[side][g] = s.d_v[side].at(unit * gates + g, 0);
        }
      h_old = of(s.h_old), h = of(s.h), c_old = of(s.c_old), c = of(s.c), c_raw = of(s.c_raw);
      d_h_new = of(s.d_h_new), d_h = of(s.d_h), d_c_new = of(s.d_c_new), d_c = of(s.d_c), d_seen = of(s.d_seen);
      vectors = s.vectors + unit * vectors_a_unit * chunk<T>, d_vectors = s.d_vectors + unit * vectors_a_unit * chunk<T>;
    }
  };

  // The place of one span: a chunk of units, a row, and where in the chunk.
  struct Place : Unit {
    long row;
    int lane;
    INLINE Place(const Unit& unit, long row, int lane) : Unit(unit), row(row), lane(lane) {}
    INLINE T* in(T* column) const { return column + row * chunk<T> + lane; }
    INLINE const T* vector(int which) const { return this->vectors + which * chunk<T> + lane; }
    INLINE T* d_vector(int which) const { return this->d_vectors + which * chunk<T> + lane; }
    INLINE T* sum(int which) const { return this->s.sums + (which * this->s.sum_rows + row) * lanes<T>; }
  };

  template <class Body> static INLINE void each(const Step<T>& s, Body body) {
    for (long n = s.first; n < s.end; ++n) {
      Unit unit(s, n);
      for (long row = 0; row < s.rows; ++row)
#pragma GCC unroll 2
        for (int lane = 0; lane < chunk<T>; lane += V::span) body(Place(unit, row, lane));
    }
  }

  static INLINE V normalised(const Place& at, int side, int gate) {
    return load_as<V>(at.in(at.v[side][gate])) * at.s.scale[side][at.row * max_gates + gate];
  }

  static INLINE V side_of(const Place& at, int side, int gate) {
    V shift = load_as<V>(at.vector(shift_of(side, gate)));
    if (!is_normed[side]) return load_as<V>(at.in(at.v[side][gate])) + shift;
    return normalised(at, side, gate) * load_as<V>(at.vector(gain_of(side, gate))) + shift;
  }

  template <int from, int to> static INLINE void pre_activations(const Place& at, V* a) {
#pragma GCC unroll 4
    for (int g = from; g < to; ++g) {
      a[g] = side_of(at, 0, g);
      if constexpr (Cell::is_diagonal) a[g] += load_as<V>(at.vector(diagonal)) * load_as<V>(at.in(at.h_old));
      if constexpr (sides == 2) {
        if (Cell::is_parted && g == gates - 1)
          a[gates] = side_of(at, 1, g);
        else
          a[g] += side_of(at, 1, g);
      }
    }
  }

  // To c, where its norm must see the whole row before `emit` can go on.
  static void update(const Step<T>& s) {
    if constexpr (has_norm_c) {
      each(s, [&](const Place& at) __attribute__((always_inline)) {
        V a[gates + 1];
        pre_activations<0, split>(at, a);
        V c = Cell::update(a, load_as<V>(at.in(at.c_old)));
        store(at.in(at.c), c);
        if (s.c_raw.data) store(at.in(at.c_raw), c);
        add_to(at.sum(sum_of_c), fold(c));
      });
    }
  }

  static INLINE V seen(const Place& at, V c) {
    if (!has_norm_c) return c;
    return (c - at.s.mean_c[at.row]) * at.s.scale_c[at.row] * load_as<V>(at.vector(gain_c)) + load_as<V>(at.vector(shift_c));
  }

  static void emit(const Step<T>& s) {
    each(s, [&](const Place& at) __attribute__((always_inline)) {
      V a[gates + 1], inner;
      pre_activations<has_norm_c ? split : 0, gates>(at, a);
      if constexpr (has_norm_c) {
        inner = seen(at, load_as<V>(at.in(at.c)));
        if (cell_norm == FESTINA_CARRIED) store(at.in(at.c), inner);
      } else if constexpr (Cell::has_c) {
        inner = Cell::update(a, load_as<V>(at.in(at.c_old)));
        store(at.in(at.c), inner);
        if (s.c_raw.data) store(at.in(at.c_raw), inner);
      } else {
        inner = load_as<V>(at.in(at.h_old));
      }
      store(at.in(at.h), Cell::emit(a, inner));
    });
  }

  static INLINE void put(bool is_added, T* to, V x) { store(to, is_added ? load_as<V>(to) + x : x); }

  // From the gradients of pre-activations to those of gain, shift and normalised product; the norm itself follows once
  // its row sums are known.
  template <int from, int to> static INLINE void spread(const Place& at, const V* d_a) {
#pragma GCC unroll 4
    for (int g = from; g < to; ++g) {
      add_to(at.d_vector(shift_of(0, g)), d_a[g]);
#pragma GCC unroll 2
      for (int side = 0; side < sides; ++side) {
        bool is_apart = side == 1 && Cell::is_parted && g == gates - 1;
        V d = is_apart ? d_a[gates] : d_a[g];
        if (is_apart) add_to(at.d_vector(shift_of(1, g)), d);
        if (is_normed[side]) {
          V hat = normalised(at, side, g);
          add_to(at.d_vector(gain_of(side, g)), d * hat);
          d = d * load_as<V>(at.vector(gain_of(side, g)));
          add_to(at.sum(side * max_gates + g), fold(d * hat));
        }
        store(at.in(at.d_v[side][g]), d);
      }
    }
  }

  static void emit_backward(const Step<T>& s) {
    each(s, [&](const Place& at) __attribute__((always_inline)) {
      V a[gates + 1], d_a[gates + 1], d_inner, d_h = load_as<V>(at.in(at.d_h_new));
      pre_activations<has_norm_c ? split : 0, gates>(at, a);
      if constexpr (has_norm_c) {
        V hat = (load_as<V>(at.in(at.c_raw)) - s.mean_c[at.row]) * s.scale_c[at.row];
        V gain = load_as<V>(at.vector(gain_c));
        Cell::emit_backward(a, hat * gain + load_as<V>(at.vector(shift_c)), d_h, d_a, d_inner);
        if (cell_norm == FESTINA_CARRIED) d_inner += load_as<V>(at.in(at.d_c_new));
        add_to(at.d_vector(gain_c), d_inner * hat);
        add_to(at.d_vector(shift_c), d_inner);
        V d_hat = d_inner * gain;
        store(at.in(at.d_seen), d_hat);
        add_to(at.sum(sum_of_c), fold(d_hat));
        add_to(at.sum(sum_of_c + 1), fold(d_hat * hat));
      } else if constexpr (Cell::has_c) {
        V c_old = load_as<V>(at.in(at.c_old)), d_c;
        Cell::emit_backward(a, load_as<V>(at.in(at.c_raw)), d_h, d_a, d_inner);
        Cell::update_backward(a, c_old, load_as<V>(at.in(at.d_c_new)) + d_inner, d_a, d_c);
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
      spread<has_norm_c ? split : 0, gates>(at, d_a);
    });
  }

  static void update_backward(const Step<T>& s) {
    if constexpr (has_norm_c) {
      each(s, [&](const Place& at) __attribute__((always_inline)) {
        V a[gates + 1], d_a[gates + 1], d_c;
        pre_activations<0, split>(at, a);
        V hat = (load_as<V>(at.in(at.c_raw)) - s.mean_c[at.row]) * s.scale_c[at.row];
        V d_raw = (load_as<V>(at.in(at.d_seen)) - s.mean_d_seen[at.row] - hat * s.mean_d_seen_hat[at.row]) * s.scale_c[at.row];
        if (cell_norm == FESTINA_READOUT) d_raw += load_as<V>(at.in(at.d_c_new));
        Cell::update_backward(a, load_as<V>(at.in(at.c_old)), d_raw, d_a, d_c);
        put(s.is_c_kept, at.in(at.d_c), d_c);
        spread<0, split>(at, d_a);
      });
    }
  }
};

// The kernels of one cell under one plan.
template <class T> struct Kernels {
  Traits traits;
  void (*update)(const Step<T>&);
  void (*emit)(const Step<T>&);
  void (*emit_backward)(const Step<T>&);
  void (*update_backward)(const Step<T>&);
};

template <class T> Kernels<T> kernels_for(const FestinaCall& call) {
#define KERNEL(id, norm, norm_c, Cell)                                             \
  if (call.cell == id && call.placement == norm && call.cell_norm == norm_c) {     \
    using K = Pointwise<T, Cell, norm, norm_c>;                                    \
    return {K::traits, K::update, K::emit, K::emit_backward, K::update_backward};  \
  }
#include "../kernels.inc"
#undef KERNEL
  return {};
}

}  // namespace ISA
