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
  const T* means;  // [groups, columns], or null
};

// Means over the rows of each group for columns [first, end).
template <class T> void column_means(const Shape& s, const Tensor<T>& weight, long columns, long first, long end, T* means) {
  for (int group = 0; group < s.groups; ++group) {
    T* mean = means + group * columns;
    for (long k = first; k < end; ++k) mean[k] = 0;
    for (int g = 0; g < s.traits.gates; ++g) {
      if (s.group_of[g] != group) continue;
      for (long row = g * s.H; row < (g + 1) * s.H; ++row) {
        if (weight.is_bfloat16) {
          for (long k = first; k < end; ++k) mean[k] += weight.get(row * columns + k);
        } else {
          const T* from = (const T*)weight.data + row * columns;
          for (long k = first; k < end; ++k) mean[k] += from[k];
        }
      }
    }
    for (long k = first; k < end; ++k) mean[k] /= (T)s.group_size[group];
  }
}

// Chunk n of the rows of a weight, as columns of a panel: [k][row within the chunk].
template <class T> void pack_transposed(const Shape& s, const Weight<T>& w, long gate, long unit, T* to) {
  long first = unit * chunk<T>, count = min(chunk<T>, w.H - first);
  const T* mean = w.means ? w.means + s.group_of[gate] * w.columns : nullptr;
  for (int l = 0; l < chunk<T>; ++l) {
    long row = (gate * w.H + first + l) * w.columns;
    for (long k = 0; k < w.columns; ++k)
      to[k * chunk<T> + l] = l < count ? w.tensor.get(row + k) - (mean ? mean[k] : T(0)) : T(0);
  }
}

// Chunk n of the columns of a weight, as columns of a panel: [row][column within the chunk]; a gate's rows are padded to
// whole chunks.
template <class T> void pack_straight(const Shape& s, const Weight<T>& w, long n, T* to) {
  long first = n * chunk<T>, count = min(chunk<T>, w.columns - first), padded = ceil_div(w.H, chunk<T>) * chunk<T>;
  for (long g = 0; g < w.gates; ++g) {
    const T* mean = w.means ? w.means + s.group_of[g] * w.columns + first : nullptr;
    for (long j = 0; j < padded; ++j, to += chunk<T>)
      for (int l = 0; l < chunk<T>; ++l)
        to[l] = j < w.H && l < count ? w.tensor.get((g * w.H + j) * w.columns + first + l) - (mean ? mean[l] : T(0)) : T(0);
  }
}

template <class T> void pack_vector(const Shape& s, const Tensor<T>& from, long gates, T* to) {
  for (long g = 0; g < gates; ++g)
    for (long j = 0; j < s.units * chunk<T>; ++j)
      to[g * s.units * chunk<T> + j] = from && j < s.H ? from.get(g * s.H + j) : T(0);
}

template <class T> void pack_vectors(const Shape& s, const FestinaCall& call, const void* const* parameters, Packed<T>& p) {
  auto tensor = [&](int which) { return Tensor<T>(parameters[which], call.type); };
  bool is_joint = call.placement == FESTINA_JOINT;
  long gates = s.traits.gates;
  pack_vector(s, tensor(is_joint ? FESTINA_GAIN : FESTINA_GAIN_IH), gates, p.gain[0]);
  pack_vector(s, tensor(is_joint ? FESTINA_BIAS : FESTINA_BIAS_IH), gates, p.shift[0]);
  pack_vector(s, tensor(FESTINA_GAIN_HH), gates, p.gain[1]);
  pack_vector(s, tensor(FESTINA_BIAS_HH), gates, p.shift[1]);
  pack_vector(s, tensor(FESTINA_BIAS_INNER), gates, p.inner);
  pack_vector(s, tensor(FESTINA_GAIN_C), 1, p.gain_c);
  pack_vector(s, tensor(FESTINA_BIAS_C), 1, p.shift_c);
  if (s.traits.is_diagonal) pack_vector(s, tensor(FESTINA_WEIGHT_HH), 1, p.diagonal);
  for (long j = 0; j < s.units * chunk<T>; ++j) p.valid[j] = j < s.H;

  long wide = s.columns() * chunk<T>;
  if (s.traits.sides == 1)  // one shift serves the sum
    for (long j = 0; j < wide; ++j) p.shift[0][j] += p.shift[1][j];
  if (!s.is_centred) return;
  for (int group = 0; group < s.groups; ++group) {
    T total = 0;
    for (int g = 0; g < gates; ++g)
      for (long j = 0; j < s.H; ++j) total += s.group_of[g] == group ? p.inner[g * s.units * chunk<T> + j] : T(0);
    for (int g = 0; g < gates; ++g)
      for (long j = 0; j < s.H; ++j)
        if (s.group_of[g] == group) p.inner[g * s.units * chunk<T> + j] -= total / (T)s.group_size[group];
  }
}

}  // namespace ISA
