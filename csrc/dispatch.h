// What each instruction set offers, and the choice among them.
#pragma once
#include "festina.h"

namespace festina {

// Calls body(context, worker, workers) on up to `threads` threads at once. Worker 0 is the calling thread.
using Parallel = void (*)(long threads, void* context, void (*body)(void* context, long worker, long workers));

// What the kernels of a cell under a plan are, where there are any.
struct Kind {
  bool has_kernels, has_c, is_diagonal;
  int gates;
};

struct Isa {
  const char* name;
  Kind (*kind_of)(const FestinaCall& call);
  FestinaBytes (*bytes)(const FestinaCall& call);
  bool (*run)(const FestinaCall& call, Parallel parallel);  // false: `go_on` has ended it
  uint64_t (*digest)(const void* memory, uint64_t bytes);
};

// The best one that this CPU runs, or the one that FESTINA_ISA names; null where it names one that cannot be used.
const Isa* chosen_isa();

// Why chosen_isa is null: a phrase.
const char* isa_refusal();

// The names of all, best first, separated by spaces.
const char* isa_names(bool is_runnable);

}  // namespace festina
