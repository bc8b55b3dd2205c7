// What a call must satisfy before kernels see it: core/ takes sizes and pointers on trust. Included by api.cc alone.
#pragma once
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "dispatch.h"
#include "layout.h"

namespace festina {

inline thread_local char error[512];

__attribute__((format(printf, 1, 2))) inline int fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error, sizeof error, format, arguments);
  va_end(arguments);
  return FESTINA_ERROR;
}

inline int fail_choice(const char* kind, int64_t got) {
  char names[256] = "";
  size_t used = 0;
  for (const Value& v : values)
    if (!strcmp(v.kind, kind) && used < sizeof names)
      used += snprintf(names + used, sizeof names - used, "%s%d (%s)", used ? ", " : "", v.value, v.name);
  return fail("%s must be one of %s, got %lld", kind, names, (long long)got);
}

inline int fail_range(const char* name, int64_t least, int64_t most, int64_t got) {
  return fail("%s must be %lld to %lld, got %lld", name, (long long)least, (long long)most, (long long)got);
}

inline int fail_null(const FestinaCall& call, const char* name) {
  return fail("%s must not be null in %s", name, name_of("pass", call.pass));
}

inline int fail_null_parameter(const char* name, int64_t d) {
  return fail("parameters: %s of direction %lld must not be null", name, (long long)d);
}

// At least as much as the core and the tensors take together. In floating point, which does not overflow; core/ counts in 64
// bits, which do not either where this is at most FESTINA_MOST_BYTES.
inline double bytes_at_most(const FestinaCall& call) {
  constexpr double chunk = 16, element = 8;
  double H = call.H + chunk, I = call.I + chunk, P = call.P + chunk, B = call.B, threads = call.threads;
  double rows = (double)call.N + (double)call.T + 5 * B + 1024;  // of any matrix
  double in_rows = 32 * H + 4 * P + 2 * I, of_weights = 16 * H * (I + P + 64);
  double of_thread = (B + 256) * (256 + I + P) + 64 * H;
  return element * (2 * (rows * in_rows + of_weights) + threads * of_thread);
}

// The fields that are no pointers, and which weights there are.
inline int check_sizes(const FestinaCall& call, const Kind& kind) {
#define CHECK_RANGE(name, least, most) \
  if (call.name < (least) || call.name > (most)) return fail_range(#name, least, most, call.name);
  CHECK_RANGE(rms, 0, 1)
  CHECK_RANGE(directions, 1, 2)
  CHECK_RANGE(threads, 1, FESTINA_MOST_THREADS)
  CHECK_RANGE(T, 0, FESTINA_MOST_SIZE)
  CHECK_RANGE(B, 0, FESTINA_MOST_SIZE)
  CHECK_RANGE(I, 0, FESTINA_MOST_SIZE)
  CHECK_RANGE(H, 1, FESTINA_MOST_SIZE)
  CHECK_RANGE(P, 1, FESTINA_MOST_SIZE)
  CHECK_RANGE(N, 0, FESTINA_MOST_SIZE)
  CHECK_RANGE(has_zoneout, 0, 1)
  CHECK_RANGE(has_zoneout_cell, 0, 1)
  CHECK_RANGE(has_panels, 0, 1)
#undef CHECK_RANGE
  if (call.panel_type != FESTINA_WHOLE_PANELS && (call.type != FESTINA_FLOAT32 || call.pass != FESTINA_INFERENCE))
    return fail("panel_type must be 0 (whole) in %s in %s, got %lld", name_of("pass", call.pass), name_of("type", call.type),
                (long long)call.panel_type);
  if (!(call.eps >= 0 && call.eps <= __DBL_MAX__)) return fail("eps must be finite and at least 0, got %g", call.eps);
  if (!(call.clip >= 0 && call.clip <= __DBL_MAX__)) return fail("clip must be finite and at least 0, got %g", call.clip);
  if (call.clip != 0 && !kind.has_c)
    return fail("clip must be 0, since cell %s has no c, got %g", name_of("cell", call.cell), call.clip);
#define CHECK_RATE(name)                                                                                \
  if (!(call.name >= 0 && call.name <= 1)) return fail(#name " must lie in [0, 1], got %g", call.name); \
  if (!call.has_##name && call.name != 0) return fail("has_" #name " must be 1 with " #name " = %g, got 0", call.name);
  CHECK_RATE(zoneout)
  CHECK_RATE(zoneout_cell)
#undef CHECK_RATE
  if ((double)call.N > (double)call.T * (double)call.B)
    return fail("N must be at most T * B, with T = %lld and B = %lld, got %lld", (long long)call.T, (long long)call.B,
                (long long)call.N);
  if (double need = bytes_at_most(call); need > (double)FESTINA_MOST_BYTES)
    return fail(
        "N, T, B, I, H and P must make at most %g bytes of tensors and buffers, got up to %g bytes from "
        "N = %lld, T = %lld, B = %lld, I = %lld, H = %lld and P = %lld",
        (double)FESTINA_MOST_BYTES, need, (long long)call.N, (long long)call.T, (long long)call.B, (long long)call.I,
        (long long)call.H, (long long)call.P);
  bool is_projected = call.parameters[0][FESTINA_WEIGHT_HR];
  if (is_projected && !kind.has_c)  // others emit h from the h before, so that both are as wide
    return fail("parameters: weight_hr must be null, since cell %s has no projection", name_of("cell", call.cell));
  if (!is_projected && call.P != call.H)
    return fail("P must be H = %lld without weight_hr, got %lld", (long long)call.H, (long long)call.P);
  for (int64_t d = 0; d < call.directions; ++d) {
    const void* const* has = call.parameters[d];
    if (!has[FESTINA_WEIGHT_IH] && call.I) return fail_null_parameter("weight_ih", d);
    if (!has[FESTINA_WEIGHT_HH]) return fail_null_parameter("weight_hh", d);
    if (is_projected != !!has[FESTINA_WEIGHT_HR])
      return fail("parameters: weight_hr must be null in both directions or in none, got null in direction %d",
                  is_projected ? 1 : 0);
    for (int i = 0; i < FESTINA_PARAMETERS; ++i)
      if (call.d_parameters[d][i] && !has[i])
        return fail("d_parameters: %s of direction %lld must be null, as the parameter is", parameter_names[i], (long long)d);
  }
  return FESTINA_OK;
}

inline int check_batch_sizes(const FestinaCall& call) {
  const int64_t* sizes = call.batch_sizes;
  int64_t before = call.B, sum = 0;
  for (int64_t t = 0; t < call.T; before = sizes[t++]) {
    if (sizes[t] < 1 || sizes[t] > before)
      return fail("batch_sizes must not rise, from at most B = %lld down to at least 1, got %lld after %lld at step %lld",
                  (long long)call.B, (long long)sizes[t], (long long)before, (long long)t);
    sum += sizes[t];  // T * B at most, and N at most if it is not refused: compared at each step, it cannot overflow
    if (sum > call.N) break;
  }
  if (sum != call.N)
    return fail("N must be the sum of batch_sizes, %s %lld, got %lld", sum > call.N ? "at least" : "which is", (long long)sum,
                (long long)call.N);
  return FESTINA_OK;
}

// The pointers that this pass needs; one of a tensor without elements may be null.
inline int check_tensors(const FestinaCall& call, const Kind& kind) {
#define CHECK_THERE(name, is_needed) \
  if (!call.name && (is_needed)) return fail_null(call, #name);
  bool is_backward = call.pass == FESTINA_BACKWARD;
  CHECK_THERE(input, call.N && call.I)
  CHECK_THERE(h_0, call.B)
  CHECK_THERE(c_0, call.B && kind.has_c)
  CHECK_THERE(output, call.N)
  CHECK_THERE(h_n, call.B && !is_backward)
  CHECK_THERE(c_n, call.B && !is_backward && kind.has_c)
  CHECK_THERE(panels, true)
  CHECK_THERE(saved, call.pass != FESTINA_INFERENCE)
  CHECK_THERE(workspace, true)
#undef CHECK_THERE
  if (call.zoneout_mask && !call.has_zoneout) return fail("has_zoneout must be 1 with a zoneout_mask, got 0");
  if (call.zoneout_cell_mask && !call.has_zoneout_cell)
    return fail("has_zoneout_cell must be 1 with a zoneout_cell_mask, got 0");
  if (call.batch_sizes) return check_batch_sizes(call);
  if ((double)call.N != (double)call.T * (double)call.B)
    return fail("N must be T * B without batch_sizes, with T = %lld and B = %lld, got %lld", (long long)call.T,
                (long long)call.B, (long long)call.N);
  return FESTINA_OK;
}

// All of what is asked of a call: of its pointers only if it is to be run. On success, `kind` is what its kernels are.
inline int check(const FestinaCall* call, bool is_run, Kind& kind) {
  if (!call) return fail("call must not be null");
  if (!chosen_isa()) return fail("%s", isa_refusal());
#define COUNT(kind, value, name) +1
#define CHECK_CHOICE(name, LIST) \
  if (call->name < 0 || call->name >= 0 LIST(COUNT)) return fail_choice(#name, call->name);
  CHECK_CHOICE(pass, FESTINA_PASSES)
  CHECK_CHOICE(type, FESTINA_TYPES)
  CHECK_CHOICE(cell, FESTINA_CELLS)
  CHECK_CHOICE(placement, FESTINA_PLACEMENTS)
  CHECK_CHOICE(groups, FESTINA_GROUPS)
  CHECK_CHOICE(cell_norm, FESTINA_CELL_NORMS)
  CHECK_CHOICE(panel_type, FESTINA_PANEL_TYPES)
#undef CHECK_CHOICE
#undef COUNT
  kind = chosen_isa()->kind_of(*call);
  if (!kind.has_kernels)
    return fail("there is no kernel for cell %s with placement %s and cell_norm %s; see kernels.inc",
                name_of("cell", call->cell), name_of("placement", call->placement), name_of("cell_norm", call->cell_norm));
  if (check_sizes(*call, kind)) return FESTINA_ERROR;
  return is_run ? check_tensors(*call, kind) : FESTINA_OK;
}

// Bytes of a parameter that is there.
inline uint64_t parameter_bytes(const FestinaCall& call, const Kind& kind, int parameter) {
  int64_t rows = kind.gates * call.H, columns = 1;
  if (parameter == FESTINA_WEIGHT_IH) columns = call.I;
  if (parameter == FESTINA_WEIGHT_HH && !kind.is_diagonal) columns = call.P;
  if (parameter == FESTINA_WEIGHT_HR) rows = call.P, columns = call.H;
  if (parameter == FESTINA_GAIN_C || parameter == FESTINA_BIAS_C) rows = call.H;
  return (uint64_t)(rows * columns) * (call.type == FESTINA_FLOAT32 ? 4 : call.type == FESTINA_FLOAT64 ? 8 : 2);
}

}  // namespace festina
