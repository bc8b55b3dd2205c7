// Weights in the order of the kernels. Where a layer norm follows a product, the weights are centred on the way: each
// column minus its mean over the rows that share statistics. The product then has mean zero, so that the norm is left
// with a sum of squares, and backward with one reduction less.
#pragma once
#include "rows.h"

namespace ISA {

// A weight [gates * H, columns] and what is subtracted from it.
template <class T> struct Weight {
  Tensor<T> tensor;
  long gates, H, columns;
  T* means;  // [groups, columns], or null
};

// Sums over rows [first, end) of each group: [groups, columns]. Memory is read from end to end.
template <class T> void sum_rows(const Shape& s, const Weight<T>& w, long first, long end, T* sums) {
  for (long i = 0; i < s.groups * w.columns; ++i) sums[i] = 0;
  for (long row = first; row < end; ++row) {
    T* sum = sums + s.group_of[row / w.H] * w.columns;
    if (w.tensor.is_bfloat16) {
      for (long k = 0; k < w.columns; ++k) sum[k] += w.tensor.get(row * w.columns + k);
    } else {
      const T* from = (const T*)w.tensor.data + row * w.columns;
      for (long k = 0; k < w.columns; ++k) sum[k] += from[k];
    }
  }
}

// Means of columns [first, end) from the sums of blocks of rows, which lie `step` apart.
template <class T>
void column_means(const Shape& s, const Weight<T>& w, const T* sums, long step, long first, long end) {
  for (int group = 0; group < s.groups; ++group)
    for (long k = first; k < end; ++k) {
      T total = 0;
      for (long block = 0; block < s.mean_blocks(); ++block) total += sums[block * step + group * w.columns + k];
      w.means[group * w.columns + k] = total / (T)s.group_size[group];
    }
}

// Columns [first, first + count) of one row of a weight, less their means; zero where there is no such row or column.
template <class T> INLINE void centred_row(const Weight<T>& w, long row, const T* mean, long first, long count, T* to) {
  if (row >= 0 && count == chunk<T> && !w.tensor.is_bfloat16) {
    const T* from = (const T*)w.tensor.data + row * w.columns + first;
    for (int l = 0; l < chunk<T>; l += lanes<T>) store(to + l, mean ? load(from + l) - load(mean + first + l) : load(from + l));
    return;
  }
  for (int l = 0; l < chunk<T>; ++l)
    to[l] = row >= 0 && l < count ? w.tensor.get(row * w.columns + first + l) - (mean ? mean[first + l] : T(0)) : T(0);
}

template <class T> const T* means_of(const Shape& s, const Weight<T>& w, long gate) {
  return w.means ? w.means + s.group_of[gate] * w.columns : nullptr;
}

// Element (k, column) of a panel.
template <class T> INLINE void put(T* panel, bool is_paired, long k, int column, T x) {
  if (is_paired)
    ((Half*)panel)[(k / 2 * chunk<T> + column) * 2 + k % 2] = to_bfloat16((float)x);
  else
    panel[k * chunk<T> + column] = x;
}

// A square of chunks turned, square by square of what the registers hold.
template <class T> void transpose_block(const T* from, T* to) {
  constexpr int C = chunk<T>, L = lanes<T>;
  for (int row = 0; row < C; row += L)
    for (int column = 0; column < C; column += L) {
      Vec<T> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = load(from + (row + i) * C + column);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(to + (column + i) * C + row, square[i]);
    }
}

// A chunk of the rows of a weight, as columns of a panel: [k][row within the chunk].
template <class T> void pack_transposed(const Shape& s, const Weight<T>& w, bool is_paired, long gate, long unit, T* to) {
  constexpr int C = chunk<T>;
  alignas(64) T block[C][C];
  for (long k = 0; k < w.columns; k += C) {
    long count = min(C, w.columns - k);
    for (int l = 0; l < C; ++l) {
      long j = unit * C + l;
      centred_row(w, j < w.H ? gate * w.H + j : -1, means_of(s, w, gate), k, count, block[l]);
    }
    if (!is_paired && count == C) {
      transpose_block(block[0], to + k * C);
      continue;
    }
    if (is_paired) count = (count + 1) / 2 * 2;  // past the last column there are zeros
    for (long i = 0; i < count; ++i)
      for (int l = 0; l < C; ++l) put(to, is_paired, k + i, l, block[l][i]);
  }
}

// A chunk of the rows of a weight, as rows of all panels: [chunk of columns][row][column within the chunk]. Rows are ordered
// as the columns of products are, unit after unit, in each the gates. A few rows at a time: each is read from end to end.
template <class T>
void pack_straight(const Shape& s, const Weight<T>& w, bool is_paired, long gate, long unit, long depth, T* panels) {
  constexpr int C = chunk<T>;
  alignas(64) T columns[C];
  for (long first = 0; first < w.columns; first += C)
    for (int l = 0; l < C; ++l) {
      long j = unit * C + l, k = (unit * w.gates + gate) * C + l;
      T* panel = panels + first * depth;
      centred_row(w, j < w.H ? gate * w.H + j : -1, means_of(s, w, gate), first, min(C, w.columns - first),
                  is_paired ? columns : panel + k * C);
      for (int c = 0; is_paired && c < C; ++c) put(panel, true, k, c, columns[c]);
    }
}

template <class T> void pack_vectors(const Shape& s, const FestinaCall& call, const void* const* parameters, Packed<T>& p) {
  bool is_joint = call.placement == FESTINA_JOINT;
  int gates = s.traits.gates;
  for (long i = 0; i < s.units * vectors_a_unit * chunk<T>; ++i) p.vectors[i] = 0;
  for (long i = 0; i < s.columns() * chunk<T>; ++i) p.inner[i] = 0;
  auto put = [&](int parameter, int gate, int which) {
    Tensor<T> from(parameters[parameter], call.type);
    for (long j = 0; from && j < s.H; ++j) vector_at(p.vectors, which, j) += from.get(gate * s.H + j);
  };
  for (int g = 0; g < gates; ++g) {
    put(is_joint ? FESTINA_GAIN_JOINT : FESTINA_GAIN_IH, g, gain_of(0, g));
    put(is_joint ? FESTINA_BIAS_JOINT : FESTINA_BIAS_IH, g, shift_of(0, g));
    put(FESTINA_GAIN_HH, g, gain_of(1, g));
    put(FESTINA_BIAS_HH, g, shift_of(s.traits.sides - 1, g));  // where there is one sum, one shift serves it
  }
  put(FESTINA_GAIN_C, 0, gain_c);
  put(FESTINA_BIAS_C, 0, shift_c);
  if (s.traits.is_diagonal) put(FESTINA_WEIGHT_HH, 0, diagonal);
  for (long j = 0; j < s.H; ++j) vector_at(p.vectors, valid, j) = 1;

  Tensor<T> inner(parameters[FESTINA_BIAS_INNER], call.type);
  if (!inner) return;
  T mean[max_gates] = {};
  for (long i = 0; s.is_centred && i < gates * s.H; ++i) mean[s.group_of[i / s.H]] += inner.get(i) / (T)s.group_size[s.group_of[i / s.H]];
  for (long i = 0; i < gates * s.H; ++i) {
    long g = i / s.H, j = i % s.H;
    p.inner[(j / chunk<T> * gates + g) * chunk<T> + j % chunk<T>] = inner.get(i) - mean[s.group_of[g]];
  }
}

}  // namespace ISA
