// Attributes of a node: what an op expects, and the typed reading of what TensorRT hands over.
//
// Every attribute is a number that stands by itself: each is there once, has the right type and length, and lies in its
// range, or the plugin is not made. Nothing has a default, so a node that lacks an attribute is never guessed at.
#pragma once

#include <array>
#include <cstring>
#include <string_view>
#include <type_traits>

#include "../cuda/kernels.h"
#include "abi.h"

namespace dllmc::tensorrt {

constexpr const char* kVersion = "1";
constexpr const char* kNamespace = "dllmc";
constexpr int kMaxFields = 16;

// An attribute's values in the order of the op's fields; int32 and float32 are exact in a double.
using Numbers = std::array<double, kMaxFields>;

template <class Member>
struct MemberOf;
template <class Owner, class Value>
struct MemberOf<Value Owner::*> {
  using Struct = Owner;
  using Type = Value;
};

// An attribute: its name in plugins/op.py, its range, and where the kernel's arguments keep it.
template <class Args>
struct Field {
  const char* name;
  bool is_float;
  double least, most;
  void (*store)(Args&, double);  // null for a flag that only says which inputs are there
};

template <class Args, size_t kCount>
using Fields = std::array<Field<Args>, kCount>;

template <auto kMember>
constexpr auto number(const char* name, double least, double most) {
  using Member = MemberOf<decltype(kMember)>;
  using Args = typename Member::Struct;
  using Type = typename Member::Type;
  const auto store = [](Args& args, double value) { args.*kMember = static_cast<Type>(value); };
  return Field<Args>{name, std::is_floating_point_v<Type>, least, most, store};
}

template <class Args>
constexpr Field<Args> flag(const char* name) {
  return {name, false, 0, 1, nullptr};
}

inline const char* type_name(nvinfer1::PluginFieldType type) {
  constexpr const char* kNames[] = {"FLOAT16", "FLOAT32", "FLOAT64", "INT8",  "INT16", "INT32", "CHAR",
                                    "DIMS",    "UNKNOWN", "BF16",    "INT64", "FP8",   "INT4"};
  const auto i = static_cast<uint32_t>(type);
  return i < std::size(kNames) ? kNames[i] : "of no known number";
}

// The field's only value. Null, or why it has none of the wanted kind.
inline const char* read_number(const nvinfer1::PluginField& field, bool is_float, double& value) {
  using nvinfer1::PluginFieldType;
  const auto read = [&](auto number) {
    std::memcpy(&number, field.data, sizeof(number));
    value = static_cast<double>(number);
  };
  const bool narrow = field.type == (is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32);
  const bool wide = field.type == (is_float ? PluginFieldType::kFLOAT64 : PluginFieldType::kINT64);
  if (!narrow && !wide) {
    const char* expected = is_float ? "FLOAT32 or FLOAT64" : "INT32 or INT64";
    return reason("%.40s: got type %s, expected %s", field.name, type_name(field.type), expected);
  }
  if (field.length != 1) return reason("%.40s: got %d values, expected 1", field.name, field.length);
  if (!field.data) return reason("%.40s: got no data, expected 1 value", field.name);
  if (is_float) {
    narrow ? read(float()) : read(double());
  } else {
    narrow ? read(int32_t()) : read(int64_t());
  }
  return nullptr;
}

// plugin_version and plugin_namespace find the creator; they reach it only where a host passes all of a node's
// attributes. Null, or why the text is not the expected one.
inline const char* check_text(const nvinfer1::PluginField& field, const char* expected) {
  if (field.type != nvinfer1::PluginFieldType::kCHAR) {
    return reason("%s: got type %s, expected text", field.name, type_name(field.type));
  }
  if (!field.data || field.length < 0) return reason("%s: got no text, expected \"%s\"", field.name, expected);
  const char* start = static_cast<const char*>(field.data);
  const std::string_view text(start, strnlen(start, static_cast<size_t>(field.length)));
  if (text == expected) return nullptr;
  const auto shown = static_cast<int>(text.size() < 40 ? text.size() : 40);
  return reason("%s: got \"%.*s\", expected \"%s\"", field.name, shown, start, expected);
}

template <class Args, size_t kCount>
const char* unknown_field(const Fields<Args, kCount>& fields, const char* got) {
  char known[160] = "";
  for (const auto& field : fields) {
    std::strncat(known, known[0] ? ", " : "", sizeof(known) - std::strlen(known) - 1);
    std::strncat(known, field.name, sizeof(known) - std::strlen(known) - 1);
  }
  return reason("%.40s: got an unknown field, expected %s", got, known);
}

template <class Args, size_t kCount>
const char* read_field(const Fields<Args, kCount>& fields, const nvinfer1::PluginField& given, Numbers& numbers,
                       std::array<bool, kMaxFields>& found) {
  if (!given.name) return "fields: got one without a name, expected names";
  if (std::strcmp(given.name, "plugin_version") == 0) return check_text(given, kVersion);
  if (std::strcmp(given.name, "plugin_namespace") == 0) return check_text(given, kNamespace);
  for (size_t i = 0; i < kCount; ++i) {
    const Field<Args>& field = fields[i];
    if (std::strcmp(given.name, field.name) != 0) continue;
    if (found[i]) return reason("%s: got it twice, expected it once", field.name);
    if (const char* why = read_number(given, field.is_float, numbers[i])) return why;
    found[i] = true;
    if (numbers[i] >= field.least && numbers[i] <= field.most) return nullptr;
    if (field.least == field.most) return reason("%s: got %.9g, expected %.9g", field.name, numbers[i], field.least);
    return reason("%s: got %.9g, expected %.9g to %.9g", field.name, numbers[i], field.least, field.most);
  }
  return unknown_field(fields, given.name);
}

// All attributes of an op. Null, or which field is wrong, what was got and what was expected.
template <class Args, size_t kCount>
const char* read_fields(const Fields<Args, kCount>& fields, const nvinfer1::PluginField* given, int32_t count,
                        Numbers& numbers) {
  static_assert(kCount <= kMaxFields);
  if (count < 0 || (count > 0 && !given)) return reason("fields: got a list of %d without entries", count);
  std::array<bool, kMaxFields> found{};
  for (int32_t i = 0; i < count; ++i) {
    if (const char* why = read_field(fields, given[i], numbers, found)) return why;
  }
  for (size_t i = 0; i < kCount; ++i) {
    if (!found[i])
      return reason("%s: got no such field, expected %s", fields[i].name,
                    fields[i].is_float ? "a float" : "an integer");
  }
  return nullptr;
}

}  // namespace dllmc::tensorrt
