/* The C ABI of the compiled core. Every tensor is contiguous; a null pointer is a tensor that is absent or not wanted.

   Alphabet: T steps, B rows, I input size, H hidden size, P width of h, N packed steps of all rows, D directions.

   Each list below makes a C type and the lines of festina_layout() that describe it: nothing is told twice, and a caller in
   another language can build its side from the library it has loaded. */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

#define FESTINA_VERSION 9
#define FESTINA_MOST_THREADS 256
#define FESTINA_MOST_SIZE (INT64_C(1) << 40)  /* of T, B, I, H, P and N, each */
#define FESTINA_MOST_BYTES (INT64_C(1) << 62) /* of all tensors and buffers of a call together */

/* clang-format off */

/* VALUE(enum, enumerator, the name that callers know it by), counted from 0. */
#define FESTINA_PASSES(VALUE)                    \
  VALUE(pass, FESTINA_INFERENCE, "inference")    \
  VALUE(pass, FESTINA_TRAINING, "training")      \
  VALUE(pass, FESTINA_BACKWARD, "backward")

#define FESTINA_TYPES(VALUE)                     \
  VALUE(type, FESTINA_FLOAT32, "float32")        \
  VALUE(type, FESTINA_FLOAT64, "float64")        \
  VALUE(type, FESTINA_BFLOAT16, "bfloat16")      \
  VALUE(type, FESTINA_FLOAT16, "float16")

#define FESTINA_CELLS(VALUE)                     \
  VALUE(cell, FESTINA_LSTM, "lstm")              \
  VALUE(cell, FESTINA_GRU, "gru")                \
  VALUE(cell, FESTINA_GRU_JOINT, "gru_joint")    \
  VALUE(cell, FESTINA_GRU_EARLY, "gru_early")    \
  VALUE(cell, FESTINA_INDRNN, "indrnn")          \
  VALUE(cell, FESTINA_INDRNN_RELU, "indrnn_relu") \
  VALUE(cell, FESTINA_GRU_STATE, "gru_state")

#define FESTINA_PLACEMENTS(VALUE)                \
  VALUE(placement, FESTINA_NO_NORM, "none")      \
  VALUE(placement, FESTINA_SEPARATE, "separate") \
  VALUE(placement, FESTINA_JOINT, "joint")

#define FESTINA_GROUPS(VALUE)                    \
  VALUE(groups, FESTINA_ALL, "all")              \
  VALUE(groups, FESTINA_EACH_GATE, "gate")       \
  VALUE(groups, FESTINA_LAST_APART, "gates|candidate")

#define FESTINA_CELL_NORMS(VALUE)                \
  VALUE(cell_norm, FESTINA_NO_CELL_NORM, "none") \
  VALUE(cell_norm, FESTINA_READOUT, "readout")   \
  VALUE(cell_norm, FESTINA_CARRIED, "carried")

/* How weights lie in panels: in the type of the call, or in float32 inference rounded, for less memory to read. */
#define FESTINA_PANEL_TYPES(VALUE)                        \
  VALUE(panel_type, FESTINA_WHOLE_PANELS, "whole")        \
  VALUE(panel_type, FESTINA_BFLOAT16_PANELS, "bfloat16")  \
  VALUE(panel_type, FESTINA_INT8_PANELS, "int8")

#define FESTINA_STATUSES(VALUE)                  \
  VALUE(status, FESTINA_OK, "ok")                \
  VALUE(status, FESTINA_ERROR, "error")          \
  VALUE(status, FESTINA_STALE, "stale")          \
  VALUE(status, FESTINA_ENDED, "ended")

/* The parameters of one direction: a subset of LayerSpec.parameter_shapes. */
#define FESTINA_PARAMETER_NAMES(PARAMETER)          \
  PARAMETER(FESTINA_WEIGHT_IH, "weight_ih")         \
  PARAMETER(FESTINA_WEIGHT_HH, "weight_hh")         \
  PARAMETER(FESTINA_BIAS_IH, "bias_ih")             \
  PARAMETER(FESTINA_BIAS_HH, "bias_hh")             \
  PARAMETER(FESTINA_WEIGHT_HR, "weight_hr")         \
  PARAMETER(FESTINA_GAIN_IH, "gain_ih")             \
  PARAMETER(FESTINA_GAIN_HH, "gain_hh")             \
  PARAMETER(FESTINA_GAIN_JOINT, "gain_joint")       \
  PARAMETER(FESTINA_BIAS_JOINT, "bias_joint")       \
  PARAMETER(FESTINA_BIAS_INNER, "bias_inner")       \
  PARAMETER(FESTINA_BIAS_INNER_HH, "bias_inner_hh") \
  PARAMETER(FESTINA_GAIN_C, "gain_c")               \
  PARAMETER(FESTINA_BIAS_C, "bias_c")

#define FESTINA_CALL(FIELD)                                                                                            \
  FIELD(int64_t, pass)                                                                                                 \
  FIELD(int64_t, type)                                                                                                 \
  FIELD(int64_t, cell)                                                                                                 \
  FIELD(int64_t, placement)                                                                                            \
  FIELD(int64_t, groups)                                                                                               \
  FIELD(int64_t, cell_norm)                                                                                            \
  FIELD(int64_t, rms)                                                                                                  \
  FIELD(int64_t, directions)                                                                                           \
  FIELD(int64_t, threads)          /* 1 to FESTINA_MOST_THREADS */                                                     \
  FIELD(int64_t, T)                                                                                                    \
  FIELD(int64_t, B)                                                                                                    \
  FIELD(int64_t, I)                                                                                                    \
  FIELD(int64_t, H)                /* at least 1 */                                                                    \
  FIELD(int64_t, P)                /* at least 1; H without weight_hr */                                               \
  FIELD(int64_t, N)                /* the sum of batch_sizes */                                                        \
  FIELD(double, eps)               /* finite, at least 0 */                                                            \
  FIELD(double, clip)              /* finite, at least 0; c is kept within +-clip, unless it is 0 */                   \
  FIELD(double, zoneout)           /* in [0, 1] */                                                                     \
  FIELD(double, zoneout_cell)                                                                                          \
  FIELD(int64_t, has_zoneout)      /* by a mask or by a rate */                                                        \
  FIELD(int64_t, has_zoneout_cell)                                                                                     \
  FIELD(FestinaGoOn, go_on)        /* null: nothing ends the call */                                                   \
  FIELD(const int64_t*, batch_sizes)       /* [T], from at most B down to at least 1; null: B rows at every step */    \
  FIELD(const uint8_t*, resets)            /* [D, N] */                                                                \
  FIELD(const uint8_t*, zoneout_mask)      /* [D, N, P] */                                                             \
  FIELD(const uint8_t*, zoneout_cell_mask) /* [D, N, H] */                                                             \
  FIELD(const void*, input)        /* [N, I] */                                                                        \
  FIELD(const void*, h_0)          /* [D, B, P] */                                                                     \
  FIELD(const void*, c_0)          /* [D, B, H] */                                                                     \
  FIELD(FestinaParameters, parameters)                                                                                 \
  FIELD(void*, output)             /* [N, D * P]; read by backward */                                                  \
  FIELD(void*, h_n)                /* [D, B, P] */                                                                     \
  FIELD(void*, c_n)                /* [D, B, H] */                                                                     \
  FIELD(void*, panels)             /* weights in the order in which the kernels of the pass read them */               \
  FIELD(int64_t, has_panels)       /* an earlier call has filled `panels`: see below */                                 \
  FIELD(int64_t, panel_type)       /* rounded ones are for inference in float32 */                                     \
  FIELD(void*, saved)              /* written by training, read by backward */                                         \
  FIELD(void*, workspace)                                                                                              \
  FIELD(const void*, d_output)                                                                                         \
  FIELD(const void*, d_h_n)                                                                                            \
  FIELD(const void*, d_c_n)                                                                                            \
  FIELD(void*, d_input)                                                                                                \
  FIELD(void*, d_h_0)                                                                                                  \
  FIELD(void*, d_c_0)                                                                                                  \
  FIELD(FestinaGradients, d_parameters)

/* What training keeps for backward takes at most saved_fixed + N * saved_per_row bytes; neither depends on N, T or B. */
#define FESTINA_BYTES(FIELD)                     \
  FIELD(uint64_t, panels)                        \
  FIELD(uint64_t, saved_fixed)                   \
  FIELD(uint64_t, saved_per_row)                 \
  FIELD(uint64_t, workspace)

/* clang-format on */

#define FESTINA_ENUMERATOR(kind, value, name) value,
enum FestinaPass { FESTINA_PASSES(FESTINA_ENUMERATOR) };
enum FestinaType { FESTINA_TYPES(FESTINA_ENUMERATOR) };
enum FestinaCell { FESTINA_CELLS(FESTINA_ENUMERATOR) };
enum FestinaPlacement { FESTINA_PLACEMENTS(FESTINA_ENUMERATOR) };
enum FestinaGroups { FESTINA_GROUPS(FESTINA_ENUMERATOR) };
enum FestinaCellNorm { FESTINA_CELL_NORMS(FESTINA_ENUMERATOR) };
enum FestinaPanelType { FESTINA_PANEL_TYPES(FESTINA_ENUMERATOR) };
enum FestinaStatus { FESTINA_STATUSES(FESTINA_ENUMERATOR) };
#undef FESTINA_ENUMERATOR

#define FESTINA_ENUMERATOR(value, name) value,
enum FestinaParameter { FESTINA_PARAMETER_NAMES(FESTINA_ENUMERATOR) FESTINA_PARAMETERS };
#undef FESTINA_ENUMERATOR

typedef const void* FestinaParameters[2][FESTINA_PARAMETERS]; /* of each direction */
typedef void* FestinaGradients[2][FESTINA_PARAMETERS];

/* Asked soon after the beginning and then about every 0.1 s, on the thread that made the call; 0 ends the call. */
typedef int (*FestinaGoOn)(void);

#define FESTINA_MEMBER(type, name) type name;
typedef struct {
  FESTINA_CALL(FESTINA_MEMBER)
} FestinaCall;

typedef struct {
  FESTINA_BYTES(FESTINA_MEMBER)
} FestinaBytes;
#undef FESTINA_MEMBER

/* FESTINA_VERSION of the core. Ask first: the rest of this file may differ between versions. */
int festina_version(void);

/* This file and kernels.inc as text, one entry a line, its words separated by single spaces:

     version 9
     size <struct> <bytes>
     field <struct> <name> <type> <offset> <count>     type: i64, u64, f64 or pointer; count: more than 1 for an array
     value <enum> <name> <integer>                     enum: pass, type, cell, placement, groups, cell_norm, panel_type or status
     parameter <name> <index>                          in [0, n); direction d's stands at d * n + index of an array
     constant <name> <integer>                         most_threads
     kernel <cell> <placement> <cell_norm>             everything that festina_run computes */
const char* festina_layout(void);

/* Every function checks what it is given: each field, the sizes that follow from several, and the pointers that the pass needs
   and that are null. What it refuses is FESTINA_ERROR, with festina_error() naming the field, what was wanted and what came,
   and nothing written. A tensor without elements may be null. What a pointer that is not null points to is taken on trust:
   that it is as large as the fields say, and on a cache line if it is panels, saved or workspace.

   A pass needs input, h_0 and output, panels and workspace, weight_ih and weight_hh of each direction, c_0 for a cell with a c;
   besides these inference h_n and c_n, training h_n, c_n and saved, backward saved. The rest may be null; the gradient of a
   parameter that is null has to be.

   Panels depend on the layer and its parameters alone. Inference and training fill the same, backward others, those of weight_ih
   only if d_input is wanted. With has_panels they must have been filled from the parameters that the call has, and no parameter
   is read: which of them are null still counts.

   Rounded panels hold weight_ih, weight_hh and weight_hr, unless that is a vector, in bfloat16, or in int8 as integers in
   [-127, 127] times a factor for each row, its largest magnitude / 127. Products are summed in float32, and all else is as it
   is. The call computes what it would with parameters that were so rounded. */

/* How many bytes the call needs; of the pointers only those of parameters and gradients count (null or not).
   FESTINA_OK or FESTINA_ERROR. */
int festina_bytes(const FestinaCall* call, FestinaBytes* bytes);

/* Carries out a pass. FESTINA_OK; FESTINA_ERROR; or FESTINA_ENDED if `go_on` ended it: then outputs, panels, saved and gradients
   are half-written. */
int festina_run(const FestinaCall* call);

/* Memory on cache lines, and on huge pages where it is large; null if there is not as much. */
void* festina_allocate(uint64_t bytes);
void festina_free(void* memory);

/* The address of each parameter, mixed with its values, all of them or a few: it tells parameters that were rewritten from
   those that filled the panels. 0 for a call that festina_bytes refuses, with festina_error(), and never else. */
uint64_t festina_fingerprint(const FestinaCall* call, int is_whole);

/* festina_run if the parameters still have this fingerprint; else FESTINA_STALE, with nothing done. */
int festina_run_panels(const FestinaCall* call, int is_whole, uint64_t fingerprint);

/* What went wrong in this thread's last call that returned FESTINA_ERROR. */
const char* festina_error(void);

/* The instruction set in use; null with festina_error() if FESTINA_ISA names one that cannot be used. */
const char* festina_isa(void);

/* The names of those compiled in, best first, separated by spaces; only those that this CPU runs, if asked so. */
const char* festina_isas(int runnable);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
