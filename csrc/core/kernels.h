// The table of kernels: which functions carry out a step of a cell under a plan.
#pragma once
#include "early.h"

namespace ISA {

// The kernels of one cell under one plan.
template <class E> struct Kernels {
  Traits traits;
  void (*update)(const CellStep<E>&);
  void (*emit)(const CellStep<E>&);
  void (*emit_backward)(const CellStep<E>&);
  void (*update_backward)(const CellStep<E>&);
};

// The struct that has them.
template <class E, class Cell, int placement, int cell_norm> struct KernelsOf {
  using type = Pointwise<E, Cell, placement, cell_norm>;
};
template <class E, int placement, int cell_norm> struct KernelsOf<E, GruEarly, placement, cell_norm> {
  using type = EarlyReset<E, GruEarly, placement>;
};

template <class E> Kernels<E> kernels_for(const FestinaCall& call) {
#define KERNEL(id, norm, norm_c, Cell)                                            \
  if (call.cell == id && call.placement == norm && call.cell_norm == norm_c) {    \
    using K = typename KernelsOf<E, Cell, norm, norm_c>::type;                    \
    return {K::traits, K::update, K::emit, K::emit_backward, K::update_backward}; \
  }
#include "../kernels.inc"
#undef KERNEL
  return {};
}

}  // namespace ISA
