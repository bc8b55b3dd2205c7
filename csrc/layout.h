// festina.h and kernels.inc as text: what festina_layout returns.
#pragma once
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "festina.h"

namespace festina {

struct Value {
  const char* kind;
  int value;
  const char* name;
};

constexpr Value values[] = {
#define VALUE(kind, value, name) {#kind, value, name},
    FESTINA_PASSES(VALUE) FESTINA_TYPES(VALUE) FESTINA_CELLS(VALUE) FESTINA_PLACEMENTS(VALUE) FESTINA_GROUPS(VALUE)
        FESTINA_CELL_NORMS(VALUE) FESTINA_PANEL_TYPES(VALUE) FESTINA_STATUSES(VALUE)
#undef VALUE
};

constexpr const char* parameter_names[] = {
#define PARAMETER(index, name) name,
    FESTINA_PARAMETER_NAMES(PARAMETER)
#undef PARAMETER
};

// The name by which callers know a value.
inline const char* name_of(const char* kind, int64_t value) {
  for (const Value& v : values)
    if (!strcmp(v.kind, kind) && v.value == value) return v.name;
  return "unknown";
}

template <class Field> constexpr const char* type_name = nullptr;
template <> constexpr const char* type_name<int64_t> = "i64";
template <> constexpr const char* type_name<uint64_t> = "u64";
template <> constexpr const char* type_name<double> = "f64";
template <class To> constexpr const char* type_name<To*> = "pointer";

// An array of arrays as its elements and their number.
template <class Field> struct Flat {
  using Element = Field;
  static constexpr int count = 1;
};
template <class Row, size_t rows> struct Flat<Row[rows]> {
  using Element = typename Flat<Row>::Element;
  static constexpr int count = rows * Flat<Row>::count;
};

struct Layout {
  char text[8192];
  size_t used = 0;

  Layout() {
    line("version %d", FESTINA_VERSION);
    line("size FestinaCall %zu", sizeof(FestinaCall));
    line("size FestinaBytes %zu", sizeof(FestinaBytes));
#define FIELD(type, name) field<type>("FestinaCall", #name, offsetof(FestinaCall, name));
    FESTINA_CALL(FIELD)
#undef FIELD
#define FIELD(type, name) field<type>("FestinaBytes", #name, offsetof(FestinaBytes, name));
    FESTINA_BYTES(FIELD)
#undef FIELD
    for (const Value& v : values) line("value %s %s %d", v.kind, v.name, v.value);
    for (int i = 0; i < FESTINA_PARAMETERS; ++i) line("parameter %s %d", parameter_names[i], i);
    line("constant most_threads %d", FESTINA_MOST_THREADS);
#define KERNEL(cell, placement, cell_norm, Cell) \
  line("kernel %s %s %s", name_of("cell", cell), name_of("placement", placement), name_of("cell_norm", cell_norm));
#include "kernels.inc"
#undef KERNEL
  }

  template <class Field> void field(const char* of, const char* name, size_t offset) {
    constexpr const char* type = type_name<typename Flat<Field>::Element>;
    static_assert(type, "the layout has no name for this type");
    line("field %s %s %s %zu %d", of, name, type, offset, Flat<Field>::count);
  }

  __attribute__((format(printf, 2, 3))) void line(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text + used, sizeof text - used, format, arguments);
    va_end(arguments);
    if (length < 0 || used + length + 2 > sizeof text) abort();  // `text` is too small for the lists
    used += length;
    text[used++] = '\n', text[used] = 0;
  }
};

}  // namespace festina
