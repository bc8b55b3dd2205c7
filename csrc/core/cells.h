// The cells. A cell takes its pre-activations `a`, normalised and shifted, and its inner state `s`: c (as its norm shows it) if
// it has one, else the h of the step before. Gates before `emit_from` serve `update` alone. has_split_candidate: the last
// gate takes its two products apart, in a[gates - 1] and a[gates]. has_gated_h: the last gate's recurrent product takes in what
// `update` makes of h.
#pragma once
#include "math.h"

namespace ISA {

struct Lstm {  // i f g o
  static constexpr int gates = 4, emit_from = 3;
  static constexpr bool has_c = true, has_split_candidate = false, is_diagonal = false, has_gated_h = false;

  template <class V> static INLINE V update(const V* a, V c) { return sigmoid(a[1]) * c + sigmoid(a[0]) * tanh(a[2]); }

  template <class V> static INLINE V emit(const V* a, V s) { return sigmoid(a[3]) * tanh(s); }

  template <class V> static INLINE void update_backward(const V* a, V c, V d_new, V* d_a, V& d_c) {
    V i = sigmoid(a[0]), f = sigmoid(a[1]), g = tanh(a[2]), d_g = d_new * i, d_i = d_g * g;
    d_a[0] = d_i - d_i * i;
    d_c = d_new * f;
    d_a[1] = d_c * c - d_c * c * f;
    d_a[2] = d_g - d_g * g * g;
  }

  template <class V> static INLINE void emit_backward(const V* a, V s, V d_h, V* d_a, V& d_s) {
    V o = sigmoid(a[3]), t = tanh(s), d_t = d_h * o, d_o = d_t * t;
    d_a[3] = d_o - d_o * o;
    d_s = d_t - d_t * t * t;
  }
};

struct Gru {  // r z n, the reset gate after the product: a[2] is n's part of x, a[3] its part of h
  static constexpr int gates = 3, emit_from = 0;
  static constexpr bool has_c = false, has_split_candidate = true, is_diagonal = false, has_gated_h = false;

  template <class V> static INLINE V emit(const V* a, V h) {
    V n = tanh(a[2] + sigmoid(a[0]) * a[3]);
    return n + sigmoid(a[1]) * (h - n);
  }

  template <class V> static INLINE void emit_backward(const V* a, V h, V d_h, V* d_a, V& d_s) {
    V r = sigmoid(a[0]), z = sigmoid(a[1]), n = tanh(a[2] + r * a[3]);
    d_s = d_h * z;
    V d_z = d_s * (h - n), d_n = d_h - d_s;
    d_a[2] = d_n - d_n * n * n;
    d_a[3] = d_a[2] * r;
    V d_r = d_a[3] * a[3];
    d_a[0] = d_r - d_r * r;
    d_a[1] = d_z - d_z * z;
  }
};

struct GruJoint {  // r z n of one sum; z lets the new state in, and starts mostly closed
  static constexpr int gates = 3, emit_from = 0;
  static constexpr bool has_c = false, has_split_candidate = false, is_diagonal = false, has_gated_h = false;

  template <class V> static INLINE V emit(const V* a, V h) {
    V n = tanh(sigmoid(a[0]) * a[2]);
    return h + sigmoid(a[1] - 1) * (n - h);
  }

  template <class V> static INLINE void emit_backward(const V* a, V h, V d_h, V* d_a, V& d_s) {
    V r = sigmoid(a[0]), z = sigmoid(a[1] - 1), n = tanh(r * a[2]);
    V d_n = d_h * z, d_z = d_n * (n - h);
    d_s = d_h - d_n;
    d_n = d_n - d_n * n * n;
    d_a[2] = d_n * r;
    V d_r = d_a[2] * a[2];
    d_a[0] = d_r - d_r * r;
    d_a[1] = d_z - d_z * z;
  }
};

// r z n. The reset gate multiplies n's part of h, whose norm follows: `update` makes it, with a[0] alone, and `emit` takes the
// whole candidate `a_n`. early.h puts the norm between them.
struct GruEarly {
  static constexpr int gates = 3, emit_from = 1;
  static constexpr bool has_c = false, has_split_candidate = true, is_diagonal = false, has_gated_h = false;

  template <class V> static INLINE V update(V a_r, V h_n) { return sigmoid(a_r) * h_n; }

  template <class V> static INLINE V emit(V a_z, V a_n, V h) {
    V n = tanh(a_n);
    return n + sigmoid(a_z) * (h - n);
  }

  template <class V> static INLINE void update_backward(V a_r, V h_n, V d, V& d_r, V& d_h_n) {
    V r = sigmoid(a_r);
    d_h_n = d * r;
    d_r = d_h_n * h_n - d_h_n * h_n * r;
  }

  template <class V> static INLINE void emit_backward(V a_z, V a_n, V h, V d_h_new, V& d_z, V& d_n, V& d_h) {
    V z = sigmoid(a_z), n = tanh(a_n);
    d_h = d_h_new * z;
    d_n = d_h_new - d_h;
    d_n = d_n - d_n * n * n;
    d_z = d_h * (h - n) - d_h * (h - n) * z;
  }
};

// r z n. The reset gate multiplies the h that n's recurrent product takes in.
struct GruState {
  static constexpr int gates = 3, emit_from = 1;
  static constexpr bool has_c = false, has_split_candidate = false, is_diagonal = false, has_gated_h = true;

  template <class V> static INLINE V update(const V* a, V h) { return GruEarly::update(a[0], h); }

  template <class V> static INLINE V emit(const V* a, V h) { return GruEarly::emit(a[1], a[2], h); }

  template <class V> static INLINE void update_backward(const V* a, V h, V d_gated_h, V* d_a, V& d_h) {
    GruEarly::update_backward(a[0], h, d_gated_h, d_a[0], d_h);
  }

  template <class V> static INLINE void emit_backward(const V* a, V h, V d_h_new, V* d_a, V& d_h) {
    GruEarly::emit_backward(a[1], a[2], h, d_h_new, d_a[1], d_a[2], d_h);
  }
};

struct Tanh {
  template <class V> static INLINE V value(V x) { return tanh(x); }
  template <class V> static INLINE V backward(V x, V d) {
    V y = tanh(x);
    return d - d * y * y;
  }
};

struct Relu {
  template <class V> static INLINE V value(V x) { return backward(x, x); }
  template <class V> static INLINE V backward(V x, V d) {
    return where_at_most(x, typename V::Element(0), broadcast_as<V>(0), d);
  }
};

template <class Activation> struct IndRnn {  // one gate; a[0] holds u * h already
  static constexpr int gates = 1, emit_from = 0;
  static constexpr bool has_c = false, has_split_candidate = false, is_diagonal = true, has_gated_h = false;

  template <class V> static INLINE V emit(const V* a, V) { return Activation::value(a[0]); }

  template <class V> static INLINE void emit_backward(const V* a, V, V d_h, V* d_a, V& d_s) {
    d_a[0] = Activation::backward(a[0], d_h);
    d_s = d_h - d_h;
  }
};

using IndRnnTanh = IndRnn<Tanh>;
using IndRnnRelu = IndRnn<Relu>;

}  // namespace ISA
