// Weights in the order in which the kernels read them. If a layer norm follows the product, the weights are centred: each
// column minus its mean over the rows that share statistics. The product then has mean zero, so that the norm needs only a
// sum of squares, and its backward one reduction less.
#pragma once
#include "rows.h"

namespace ISA {

// A weight [gates * H, columns] and what is subtracted from it.
template <class E> struct Weight {
  Tensor<E> tensor;
  long gates, H, columns;
  E* means;  // [groups, columns], or null
  int centred_gates;
};

// Sums over rows [first, end) of each group: [groups, columns]. Memory is read from end to end.
template <class E> void sum_rows(const Shape& s, const Weight<E>& w, long first, long end, E* sums) {
  for (long i = 0; i < s.groups * w.columns; ++i) sums[i] = 0;
  for (long row = first; row < end; ++row) {
    E* sum = sums + s.group_of[row / w.H] * w.columns;
    if (w.tensor.is_narrow) {
      alignas(64) E own[chunk<E>];
      long k = 0, at = row * w.columns;
      for (; k + chunk<E> <= w.columns; k += chunk<E>) {
        w.tensor.get_chunk(at + k, own);
        for (int l = 0; l < chunk<E>; l += lanes<E>) add_to(sum + k + l, load(own + l));
      }
      for (; k < w.columns; ++k) sum[k] += w.tensor.get(at + k);
    } else {
      const E* from = (const E*)w.tensor.data + row * w.columns;
      for (long k = 0; k < w.columns; ++k) sum[k] += from[k];
    }
  }
}

// Means of columns [first, end) from the sums of blocks of rows, which lie `stride` apart.
template <class E>
void column_means(const Shape& s, const Weight<E>& w, const E* sums, long stride, long first, long end) {
  for (int group = 0; group < s.groups; ++group)
    for (long k = first; k < end; ++k) {
      E total = 0;
      for (long block = 0; block < s.mean_blocks(); ++block) total += sums[block * stride + group * w.columns + k];
      w.means[group * w.columns + k] = total / (E)s.group_size[group];
    }
}

// Columns [first, first + count) of one row of a weight, less their means; zeros for a row of -1 and for columns past the last.
template <class E> INLINE void centred_row(const Weight<E>& w, long row, const E* mean, long first, long count, E* to) {
  if (row >= 0 && count == chunk<E>) {
    w.tensor.get_chunk(row * w.columns + first, to);
    for (int l = 0; mean && l < chunk<E>; l += lanes<E>) store(to + l, load(to + l) - load(mean + first + l));
    return;
  }
  for (int l = 0; l < chunk<E>; ++l)
    to[l] = row >= 0 && l < count ? w.tensor.get(row * w.columns + first + l) - (mean ? mean[first + l] : E(0)) : E(0);
}

template <class E> const E* means_of(const Shape& s, const Weight<E>& w, long gate) {
  return w.means && gate < w.centred_gates ? w.means + s.group_of[gate] * w.columns : nullptr;
}

// Element (k, column) of a panel.
template <class E> INLINE void put(E* panel, bool is_paired, long k, int column, E x) {
  if (is_paired)
    ((Half*)panel)[(k / 2 * chunk<E> + column) * 2 + k % 2] = to_bfloat16((float)x);
  else
    panel[k * chunk<E> + column] = x;
}

// Transposes a square of chunk x chunk numbers, in squares of lanes x lanes.
template <class E> void transpose_block(const E* from, E* to) {
  constexpr int C = chunk<E>, L = lanes<E>;
  for (int row = 0; row < C; row += L)
    for (int column = 0; column < C; column += L) {
      Vec<E> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = load(from + (row + i) * C + column);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(to + (column + i) * C + row, square[i]);
    }
}

// Fills the panel of chunk n of a gate's rows, as its columns: [k][row within the chunk].
template <class E> void fill_panel(const Shape& s, const Weight<E>& w, bool is_paired, long gate, long n, E* to) {
  constexpr int C = chunk<E>;
  alignas(64) E block[C][C];
  for (long k = 0; k < w.columns; k += C) {
    long count = min(C, w.columns - k);
    for (int l = 0; l < C; ++l) {
      long j = n * C + l;
      centred_row(w, j < w.H ? gate * w.H + j : -1, means_of(s, w, gate), k, count, block[l]);
    }
    if (!is_paired && count == C) {
      transpose_block(block[0], to + k * C);
      continue;
    }
    if (is_paired) count = (count + 1) / 2 * 2;  // zeros follow the last column
    for (long i = 0; i < count; ++i)
      for (int l = 0; l < C; ++l) put(to, is_paired, k + i, l, block[l][i]);
  }
}

// Fills the panel of chunk n of a gate's rows with integers in [-127, 127], behind the factor of each. NaN becomes -127.
inline void fill_panel_int8(const Weight<float>& w, long gate, long n, Four* to) {
  constexpr int C = chunk<float>;
  float* scales = (float*)to;
  for (int l = 0; l < C; ++l) {
    long j = n * C + l, row = (gate * w.H + j) * w.columns;
    float most = 0;
    for (long k = 0; j < w.H && k < w.columns; ++k) most = __builtin_fmaxf(most, __builtin_fabsf(w.tensor.get(row + k)));
    float unit = most / 127;
    scales[l] = unit * four_unit;
    for (long k = 0; k < ceil_div(w.columns, 4) * 4; ++k) {
      float x = j < w.H && k < w.columns && unit > 0 ? __builtin_rintf(w.tensor.get(row + k) / unit) : 0;
      to[(1 + k / 4) * C + l].value[k % 4] = (int8_t)(x > -127 ? x < 127 ? x : 127 : -127);
    }
  }
}

// Panel n of a weight: as it is and centred, or rounded and not, since rounding would leave a mean; Forward::begin subtracts it.
template <class E> void fill_panel(const Shape& s, Weight<E> w, bool is_paired, long n, E* to) {
  long gate = n % w.gates;
  n /= w.gates;
  if (s.is_rounded()) w.means = nullptr;
  if constexpr (sizeof(E) == sizeof(float)) {
    if (s.panel_type == FESTINA_INT8_PANELS) return fill_panel_int8(w, gate, n, (Four*)to);
  }
  fill_panel(s, w, is_paired || s.is_rounded(), gate, n, to);
}

// Fills the rows of all panels from chunk `at` on with chunk n of a gate's rows: [chunk of columns][row][column within the
// chunk]. A few rows at a time, each read from end to end.
template <class E>
void fill_panel_rows(const Shape& s, const Weight<E>& w, bool is_paired, long gate, long n, long at, long depth, E* panels) {
  constexpr int C = chunk<E>;
  alignas(64) E columns[C];
  for (long first = 0; first < w.columns; first += C)
    for (int l = 0; l < C; ++l) {
      long j = n * C + l, k = at * C + l;
      E* panel = panels + first * depth;
      centred_row(w, j < w.H ? gate * w.H + j : -1, means_of(s, w, gate), first, min(C, w.columns - first),
                  is_paired ? columns : panel + k * C);
      for (int c = 0; is_paired && c < C; ++c) put(panel, true, k, c, columns[c]);
    }
}

template <class E> void fill_vectors(const Shape& s, const FestinaCall& call, const void* const* parameters, Panels<E>& p) {
  bool is_joint = call.placement == FESTINA_JOINT;
  int gates = s.traits.gates;
  for (long i = 0; i < s.H_chunks * vectors_a_chunk * chunk<E>; ++i) p.vectors[i] = 0;
  for (int side = 0; side < s.traits.sides; ++side)
    for (long i = 0; i < s.columns() * chunk<E>; ++i) p.inner[side][i] = 0;
  auto put = [&](int parameter, int gate, int which) {
    Tensor<E> from(parameters[parameter], call.type);
    for (long j = 0; from && j < s.H; ++j) vector_at(p.vectors, which, j) += from.get(gate * s.H + j);
  };
  for (int g = 0; g < gates; ++g) {
    put(is_joint ? FESTINA_GAIN_JOINT : FESTINA_GAIN_IH, g, gain_of(0, g));
    put(is_joint ? FESTINA_BIAS_JOINT : FESTINA_BIAS_IH, g, shift_of(0, g));
    put(FESTINA_GAIN_HH, g, gain_of(1, g));
    put(FESTINA_BIAS_HH, g, shift_of(s.traits.sides - 1, g));  // one sum takes one shift
  }
  put(FESTINA_GAIN_C, 0, gain_c);
  put(FESTINA_BIAS_C, 0, shift_c);
  if (s.traits.is_diagonal) put(FESTINA_WEIGHT_HH, 0, diagonal);
  for (long j = 0; j < s.H; ++j) vector_at(p.vectors, valid, j) = 1;

  auto put_inner = [&](int parameter, int centred_gates) {
    Tensor<E> from(parameters[parameter], call.type);
    if (!from) return;
    E mean[max_gates] = {};
    for (long i = 0; s.is_centred && i < centred_gates * s.H; ++i)
      mean[s.group_of[i / s.H]] += from.get(i) / (E)s.group_size[s.group_of[i / s.H]];
    for (long i = 0; i < gates * s.H; ++i) {
      long g = i / s.H, j = i % s.H;
      bool is_summed = s.traits.sides == 1 || (s.traits.has_split_sum() && g < gates - 1);
      E* to = p.inner[parameter == FESTINA_BIAS_INNER || is_summed ? 0 : 1];
      to[(j / chunk<E> * gates + g) * chunk<E> + j % chunk<E>] += from.get(i) - mean[s.group_of[g]];
    }
  };
  put_inner(FESTINA_BIAS_INNER, gates);
  put_inner(FESTINA_BIAS_INNER_HH, s.traits.centred_gates());
}

// Whether a product of one side begins with Panels::inner.
inline bool has_inner_bias(const Shape& s, const void* const* parameters, int side) {
  bool is_of_h = parameters[FESTINA_BIAS_INNER_HH];
  if (side == 1) return is_of_h;
  return parameters[FESTINA_BIAS_INNER] || (is_of_h && (s.traits.sides == 1 || s.traits.has_split_sum()));
}

}  // namespace ISA
