// What one instruction set offers dispatch.cc.
#pragma once
#include "../dispatch.h"
#include "core.h"
#include "digest.h"

namespace ISA {

template <class E> bool run(const FestinaCall& call, festina::Parallel parallel) {
  Core<E> core(call);
  core.begin();
  parallel(call.threads, &core, [](void* context, long worker, long workers) { ((Core<E>*)context)->run(worker, workers); });
  return !core.common.watch->is_ended();
}

inline festina::Kind kind_of(const FestinaCall& call) {
  Kernels<float> k = kernels_for<float>(call);
  return {k.emit != nullptr, k.traits.has_c, k.traits.is_diagonal, k.traits.gates};
}

// An instruction set that adds nothing for float64 names another that serves it there: FLOAT64_OF.
#ifdef FLOAT64_OF
}
namespace FLOAT64_OF {
extern const festina::Isa isa;
}
namespace ISA {
inline FestinaBytes bytes_float64(const FestinaCall& call) { return FLOAT64_OF::isa.bytes(call); }
inline bool run_float64(const FestinaCall& call, festina::Parallel parallel) { return FLOAT64_OF::isa.run(call, parallel); }
#else
inline FestinaBytes bytes_float64(const FestinaCall& call) { return Core<double>(call).bytes(); }
inline bool run_float64(const FestinaCall& call, festina::Parallel parallel) { return run<double>(call, parallel); }
#endif

inline FestinaBytes bytes(const FestinaCall& call) {
  return call.type == FESTINA_FLOAT64 ? bytes_float64(call) : Core<float>(call).bytes();
}

inline bool run_any(const FestinaCall& call, festina::Parallel parallel) {
  return call.type == FESTINA_FLOAT64 ? run_float64(call, parallel) : run<float>(call, parallel);
}

#define NAME_OF(isa) #isa
#define NAMED(isa) NAME_OF(isa)
extern const festina::Isa isa{NAMED(ISA), kind_of, bytes, run_any, digest};

}  // namespace ISA
