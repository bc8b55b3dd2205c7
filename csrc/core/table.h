// The entry of one instruction set into dispatch.cc.
#pragma once
#include "../dispatch.h"
#include "core.h"

namespace ISA {

template <class T> void run(const FestinaCall& call, festina::Parallel parallel) {
  Core<T> core(call);
  core.begin();
  parallel(call.threads, &core, [](void* context, long worker, long workers) { ((Core<T>*)context)->run(worker, workers); });
}

inline bool has_kernels(const FestinaCall& call) { return kernels_for<float>(call).emit; }

inline FestinaBytes bytes(const FestinaCall& call) {
  return call.type == FESTINA_FLOAT64 ? Core<double>(call).bytes : Core<float>(call).bytes;
}

inline void run_any(const FestinaCall& call, festina::Parallel parallel) {
  call.type == FESTINA_FLOAT64 ? run<double>(call, parallel) : run<float>(call, parallel);
}

#define NAME_OF(isa) #isa
#define NAMED(isa) NAME_OF(isa)
extern const festina::Isa isa{NAMED(ISA), has_kernels, bytes, run_any};

}  // namespace ISA
