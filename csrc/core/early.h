// The kernels of a cell whose reset gate multiplies the candidate's recurrent product before its norm. The candidate is an
// inner value as the LSTM's c is: `update` makes it, its norm needs the whole row, and `emit` goes on from there. It is no
// state.
#pragma once
#include "pointwise.h"

namespace ISA {

template <class E, class Cell, int placement> struct EarlyReset : Pointwise<E, Cell, placement, FESTINA_NO_CELL_NORM> {
  using Base = Pointwise<E, Cell, placement, FESTINA_NO_CELL_NORM>;
  using typename Base::Place;
  using typename Base::V;
  static constexpr bool is_joint = placement == FESTINA_JOINT, is_normed = placement != FESTINA_NO_NORM;
  static constexpr int last = Cell::gates - 1;
  static constexpr int norm_side = is_joint ? 0 : 1;  // whose gain and shift those of the candidate's norm are
  static constexpr Traits traits{Cell::gates, 2,   false, true, false, {is_normed, placement == FESTINA_SEPARATE},
                                 is_normed,   true};

  // Pre-activation of a gate before the last.
  static INLINE V gate(const Place& at, int g) {
    V a = Base::side_of(at, 0, g);
    return is_joint ? a : a + Base::side_of(at, 1, g);
  }
  static INLINE V product(const Place& at, int side) { return load_as<V>(at.in(at.v[side][last])); }

  // The value that the candidate's norm takes in.
  static INLINE V candidate(const Place& at) {
    V of_h = Cell::update(gate(at, 0), product(at, 1));
    return is_joint ? product(at, 0) + of_h : of_h;
  }

  static INLINE V hat(const Place& at, V raw) { return (raw - at.s.mean_c[at.row]) * at.s.scale_c[at.row]; }

  // The candidate's pre-activation, from its normalised value, or without a norm from its value.
  static INLINE V pre_activation(const Place& at, V value) {
    V a = (is_normed ? value * load_as<V>(at.vector(gain_of(norm_side, last))) : value) +
          load_as<V>(at.vector(shift_of(norm_side, last)));
    return is_joint ? a : a + Base::side_of(at, 0, last);
  }

  static void update(const CellStep<E>& s) {
    if constexpr (is_normed) {
      Base::each(s, [&](const Place& at) __attribute__((always_inline)) {
        V raw = candidate(at);
        store(at.in(at.c), raw);
        if (s.c_raw.data) store(at.in(at.c_raw), raw);
        add_to(at.sum(sum_of_c), fold(raw));
      });
    }
  }

  static void emit(const CellStep<E>& s) {
    Base::each(s, [&](const Place& at) __attribute__((always_inline)) {
      V value;
      if constexpr (is_normed)
        value = hat(at, load_as<V>(at.in(at.c)));
      else
        value = candidate(at);
      store(at.in(at.h), Cell::emit(gate(at, 1), pre_activation(at, value), load_as<V>(at.in(at.h_old))));
    });
  }

  // From the gradient of a pre-activation to those of gain, shift and normalised product of one side.
  static INLINE void spread(const Place& at, int side, int g, V d, bool is_shift_shared) {
    if (!is_shift_shared) add_to(at.d_vector(shift_of(side, g)), d);
    if (Base::is_normed[side]) {
      V normalized = Base::normalized(at, side, g);
      add_to(at.d_vector(gain_of(side, g)), d * normalized);
      d = d * load_as<V>(at.vector(gain_of(side, g)));
      add_to(at.sum(side * max_gates + g), fold(d * normalized));
    }
    store(at.in(at.d_v[side][g]), d);
  }

  // Of a gate before the last. Under a joint norm both products have one gradient, which side 0 takes; both sides share a shift.
  static INLINE void spread_gate(const Place& at, int g, V d) {
    spread(at, 0, g, d, false);
    if (!is_joint) spread(at, 1, g, d, true);
  }

  // Gradients of the reset gate and of the candidate's products, from that of `candidate`.
  static INLINE void candidate_backward(const Place& at, V d) {
    V d_r, d_product;
    Cell::update_backward(gate(at, 0), product(at, 1), d, d_r, d_product);
    store(at.in(at.d_v[1][last]), d_product);
    if (is_joint) store(at.in(at.d_v[0][last]), d);
    spread_gate(at, 0, d_r);
  }

  static void emit_backward(const CellStep<E>& s) {
    Base::each(s, [&](const Place& at) __attribute__((always_inline)) {
      V value, d_z, d_n, d_h;
      if constexpr (is_normed)
        value = hat(at, load_as<V>(at.in(at.c_raw)));
      else
        value = candidate(at);
      V h_old = load_as<V>(at.in(at.h_old)), d_h_new = load_as<V>(at.in(at.d_h_new));
      Cell::emit_backward(gate(at, 1), pre_activation(at, value), h_old, d_h_new, d_z, d_n, d_h);
      Base::put(s.is_h_kept, at.in(at.d_h), d_h);
      spread_gate(at, 1, d_z);
      if (!is_joint) spread(at, 0, last, d_n, false);
      add_to(at.d_vector(shift_of(norm_side, last)), d_n);
      if constexpr (is_normed) {
        add_to(at.d_vector(gain_of(norm_side, last)), d_n * value);
        V d_hat = d_n * load_as<V>(at.vector(gain_of(norm_side, last)));
        store(at.in(at.d_c_hat), d_hat);
        add_to(at.sum(sum_of_c), fold(d_hat));
        add_to(at.sum(sum_of_c + 1), fold(d_hat * value));
      } else {
        candidate_backward(at, d_n);
      }
    });
  }

  static void update_backward(const CellStep<E>& s) {
    if constexpr (is_normed) {
      Base::each(s, [&](const Place& at) __attribute__((always_inline)) {
        V value = hat(at, load_as<V>(at.in(at.c_raw)));
        V d = load_as<V>(at.in(at.d_c_hat)) - s.d_c_hat_mean[at.row] - value * s.d_c_hat_dot[at.row];
        candidate_backward(at, d * s.scale_c[at.row]);
      });
    }
  }
};

}  // namespace ISA
