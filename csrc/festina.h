/* The C ABI of the compiled core. Every tensor is contiguous; a null pointer is a tensor that is absent or not wanted.

   Alphabet: T steps, B rows, I input size, H hidden size, P what h is wide, N valid steps of all rows, D directions. */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#pragma GCC visibility push(default)

#define FESTINA_VERSION 4

enum FestinaPass { FESTINA_INFERENCE, FESTINA_TRAINING, FESTINA_BACKWARD };
enum FestinaType { FESTINA_FLOAT32, FESTINA_FLOAT64, FESTINA_BFLOAT16 };
enum FestinaCell { FESTINA_LSTM, FESTINA_GRU, FESTINA_GRU_JOINT, FESTINA_INDRNN, FESTINA_INDRNN_RELU };
enum FestinaPlacement { FESTINA_NO_NORM, FESTINA_SEPARATE, FESTINA_JOINT };
enum FestinaGroups { FESTINA_ALL, FESTINA_EACH_GATE, FESTINA_LAST_APART };
enum FestinaCellNorm { FESTINA_NO_CELL_NORM, FESTINA_READOUT, FESTINA_CARRIED };

/* The parameters of one direction, in the order of LayerSpec.parameter_shapes. */
enum FestinaParameter {
  FESTINA_WEIGHT_IH, FESTINA_WEIGHT_HH, FESTINA_BIAS_IH, FESTINA_BIAS_HH, FESTINA_WEIGHT_HR, FESTINA_GAIN_IH,
  FESTINA_GAIN_HH, FESTINA_GAIN, FESTINA_BIAS, FESTINA_BIAS_INNER, FESTINA_GAIN_C, FESTINA_BIAS_C, FESTINA_PARAMETERS
};

typedef struct {
  uint64_t bytes, version; /* sizeof(FestinaCall), FESTINA_VERSION */
  int64_t pass, type, cell, placement, groups, cell_norm, rms, directions, threads;
  int64_t T, B, I, H, P, N;
  double eps, zoneout, zoneout_cell;
  int64_t has_zoneout, has_zoneout_cell; /* by a mask or by a rate */
  const int64_t* batch_sizes;            /* [T], or null: B rows at every step */
  const uint8_t *resets, *zoneout_mask, *zoneout_cell_mask; /* [D, N], [D, N, P], [D, N, H] */
  const void *input, *h_0, *c_0;                            /* [N, I], [D, B, P], [D, B, H] */
  const void* parameters[2][FESTINA_PARAMETERS];
  void *output, *h_n, *c_n; /* [N, D * P], [D, B, P], [D, B, H]; backward reads output */
  void* packed;             /* weights in the order of the pass's kernels */
  int64_t is_packed;        /* inference: packed is filled from an earlier call with the same parameters */
  void* saved;              /* written by training, read by backward */
  void* workspace;
  const void *d_output, *d_h_n, *d_c_n;
  void *d_input, *d_h_0, *d_c_0;
  void* d_parameters[2][FESTINA_PARAMETERS];
} FestinaCall;

typedef struct {
  uint64_t packed, saved, workspace;
} FestinaBytes;

/* FESTINA_VERSION of the core. */
int festina_version(void);

/* How many bytes the call needs; of the pointers only those of backward's gradients count (null or not).
   0, or 1 with festina_error() telling why. */
int festina_bytes(const FestinaCall* call, FestinaBytes* bytes);

/* Carries out a pass. 0, or 1 with festina_error() telling why. */
int festina_run(const FestinaCall* call);

/* Memory on cache lines, and on huge pages where it is large; null where there is none left. */
void* festina_allocate(uint64_t bytes);
void festina_free(void* memory);

/* The address of each parameter, mixed with its values, all of them or a few: it tells rewritten parameters from those that
   were packed. */
uint64_t festina_fingerprint(const FestinaCall* call, const uint64_t bytes[2][FESTINA_PARAMETERS], int is_whole);

/* festina_run, if the parameters still have this fingerprint; 2, with nothing done, if not. */
int festina_run_packed(const FestinaCall* call, const uint64_t bytes[2][FESTINA_PARAMETERS], int is_whole, uint64_t fingerprint);

/* What went wrong in this thread's last call that returned 1. */
const char* festina_error(void);

/* The instruction set in use; null with festina_error() where FESTINA_ISA names one that cannot be used. */
const char* festina_isa(void);

/* The names of those compiled in, best first, separated by spaces; only those that this CPU runs, if asked so. */
const char* festina_isas(int runnable);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
