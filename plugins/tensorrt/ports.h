// Inputs and outputs of a node: which are there, which types they have, and how their sizes hang together.
//
// A shape is written with one letter an axis. A letter stands for one size in the whole node: `*` for any number of
// leading axes, the same everywhere (rows = their product), `1` for one, `#` alone for any shape with one value a row.
// Letters are bound by the inputs where they first stand, or an op gives them as a multiple of another letter (Axis).
#pragma once

#include <type_traits>

#include "fields.h"

namespace dllmc::tensorrt {

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr int kMaxPorts = 8;
constexpr int32_t kMaxSize = 1 << 24;                      // of an attribute that is a size
constexpr double kLeastFloat = 1e-30;                      // of an attribute above 0
constexpr DataType kFloating = static_cast<DataType>(-1);  // FLOAT or HALF

inline const char* type_name(DataType type) {
  constexpr const char* kNames[] = {"FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64", "INT4"};
  const auto i = static_cast<uint32_t>(type);
  return type == kFloating ? "FLOAT or HALF" : i < std::size(kNames) ? kNames[i] : "of no known number";
}

template <class Args>
struct Port {
  const char* name;
  const char* shape;
  const char* flag;  // the attribute that says whether it is there, "!name" for its contrary; null: always
  const char* like;  // a floating output has the type of this input; HALF where that is absent
  DataType type;
  void (*bind)(Args&, void*, DataType);
};

template <class Value>
constexpr DataType data_type() {
  if (std::is_same_v<Value, float>) return DataType::kFLOAT;
  if (std::is_same_v<Value, int8_t>) return DataType::kINT8;
  if (std::is_same_v<Value, int32_t>) return DataType::kINT32;
  if (std::is_same_v<Value, int64_t>) return DataType::kINT64;
  return kFloating;
}

// A tensor that goes to the member kPointer of the kernel's arguments, whose type is the tensor's.
template <auto kPointer>
constexpr auto port(const char* name, const char* shape, const char* flag = nullptr) {
  using Member = MemberOf<decltype(kPointer)>;
  using Value = std::remove_pointer_t<typename Member::Type>;
  static_assert(!std::is_void_v<Value>, "a floating tensor says its type: floating_port");
  const auto bind = [](typename Member::Struct& args, void* data, DataType) {
    args.*kPointer = static_cast<Value*>(data);
  };
  return Port<typename Member::Struct>{name, shape, flag, nullptr, data_type<std::remove_const_t<Value>>(), bind};
}

// A FLOAT or HALF tensor, whose type goes to the member kType.
template <auto kPointer, auto kType>
constexpr auto floating_port(const char* name, const char* shape, const char* flag = nullptr,
                             const char* like = nullptr) {
  using Args = typename MemberOf<decltype(kPointer)>::Struct;
  const auto bind = [](Args& args, void* data, DataType type) {
    args.*kPointer = data;
    args.*kType = type == DataType::kFLOAT ? Type::kFloat32 : Type::kFloat16;
  };
  return Port<Args>{name, shape, flag, like, kFloating, bind};
}

// A size that follows: `name` = `base` * numerator / denominator, base '1' for the number itself.
struct Axis {
  char name, base;
  int32_t numerator, denominator;
};

// `groups` of `size` codes each, `per_base` codes for one of `base`; one group where the size is 0.
constexpr Axis groups(char name, char base, int32_t per_base, int32_t size) {
  return size ? Axis{name, base, per_base, size} : Axis{name, '1', 1, 1};
}

inline const char* find_axis(const char* shape, char letter) {
  return letter == '*' || letter == '#' ? nullptr : std::strchr(shape, letter);
}

// The axes of `shape` in a tensor of `rank` axes: the last `letters` ones have letters, `lead` stand before.
struct Split {
  int32_t lead;
  const char* letters;
};

// Null, or why a tensor of this rank has not this shape.
inline const char* split_shape(const char* name, const char* shape, int32_t rank, Split& split) {
  const bool leads = shape[0] == '*';
  const auto count = static_cast<int32_t>(std::strlen(shape)) - leads;
  split = {rank - count, shape + leads};
  if (rank >= 0 && rank <= Dims::MAX_DIMS && (leads ? rank >= count : rank == count)) return nullptr;
  return reason("%s: got %d axes, expected %s%d", name, rank, leads ? "at least " : "", count);
}

// What the sizes of a node's tensors are.
struct Sizes {
  Dims lead{-1, {}};  // -1: no input with leading axes was seen
  int64_t rows = 1;
  std::array<int64_t, 128> letter{};  // 0: not bound

  int32_t operator[](char name) const { return static_cast<int32_t>(letter[static_cast<size_t>(name)]); }

  const char* bind_lead(const char* name, const Dims& dims, int32_t count) {
    lead.nbDims = count;
    for (int32_t i = 0; i < count; ++i) {
      lead.d[i] = dims.d[i];
      if (dims.d[i] < 0 || __builtin_mul_overflow(rows, dims.d[i], &rows) || rows > INT32_MAX) {
        return reason("%s: got %lld at axis %d, expected sizes with a product below 2^31", name,
                      static_cast<long long>(dims.d[i]), i);
      }
    }
    return nullptr;
  }

  // Binds what is not bound yet. Null, or why the sizes are none.
  const char* bind(const char* name, const char* shape, const Dims& dims) {
    if (shape[0] == '#') return nullptr;
    Split split;
    if (const char* why = split_shape(name, shape, dims.nbDims, split)) return why;
    if (shape[0] == '*' && lead.nbDims < 0) {
      if (const char* why = bind_lead(name, dims, split.lead)) return why;
    }
    for (int32_t i = split.lead; i < dims.nbDims; ++i) {
      if (dims.d[i] < 1 || dims.d[i] > INT32_MAX) {
        return reason("%s: got %lld at axis %d, expected 1 to 2^31 - 1", name, static_cast<long long>(dims.d[i]), i);
      }
      int64_t& size = letter[static_cast<size_t>(split.letters[i - split.lead])];
      if (!size) size = dims.d[i];
    }
    return nullptr;
  }

  const char* check_axis(const char* name, const Dims& dims, int32_t axis, int64_t expected) const {
    if (dims.d[axis] == expected) return nullptr;
    return reason("%s: got %lld at axis %d, expected %lld", name, static_cast<long long>(dims.d[axis]), axis,
                  static_cast<long long>(expected));
  }

  const char* check_rows(const char* name, const Dims& dims) const {
    int64_t count = 1;
    for (int32_t i = 0; i < dims.nbDims; ++i) {
      if (dims.d[i] < 0 || __builtin_mul_overflow(count, dims.d[i], &count)) count = -1;
    }
    if (count == rows) return nullptr;
    return reason("%s: got %lld values, expected %lld, one a row", name, static_cast<long long>(count),
                  static_cast<long long>(rows));
  }

  // Null, or where the sizes are not those of the letters.
  const char* check(const char* name, const char* shape, const Dims& dims) const {
    if (shape[0] == '#') return check_rows(name, dims);
    Split split;
    if (const char* why = split_shape(name, shape, dims.nbDims, split)) return why;
    if (shape[0] == '*' && split.lead != lead.nbDims) {
      return reason("%s: got %d leading axes, expected %d", name, split.lead, lead.nbDims);
    }
    for (int32_t i = 0; i < dims.nbDims; ++i) {
      const char name_of = i < split.lead ? '*' : split.letters[i - split.lead];
      const int64_t expected = name_of == '*' ? lead.d[i] : name_of == '1' ? 1 : letter[static_cast<size_t>(name_of)];
      if (const char* why = check_axis(name, dims, i, expected)) return why;
    }
    return nullptr;
  }
};

}  // namespace dllmc::tensorrt
