// What a plugin writes into an engine: one blob that says by itself what it is.
//
//   WireHeader    magic, version of this layout, whole size, plugin, number of attributes
//   WireNumber    name, type, value          as often as the header says
//   checksum      of all bytes before it, 64 bits
//
// TensorRT would carry the attributes as plain fields, too. A blob is better: an engine outlives the library that built
// it, and names, version and checksum tell another library's or a damaged engine apart before a kernel runs on numbers
// that mean something else. The attributes inside are read as fields again, so both phases share one set of checks.
// Bytes stand in the machine's order: an engine never crosses to a machine of another one.
#pragma once

#include <cstring>

#include "fields.h"

namespace dllmc::tensorrt {

constexpr char kWireField[] = "dllmc_state";
constexpr char kWireMagic[8] = {'d', 'l', 'l', 'm', 'c', 'T', 'R', 'T'};
constexpr uint32_t kWireVersion = 1;

struct WireHeader {
  char magic[8];
  uint32_t version;
  uint32_t size;  // of the whole blob in bytes
  char plugin[24];
  uint32_t count;
  uint32_t zero;
};
struct WireNumber {
  char name[20];
  nvinfer1::PluginFieldType type;  // kINT64 or kFLOAT64
  char value[8];
};
static_assert(sizeof(WireHeader) == 48 && sizeof(WireNumber) == 32, "members leave no gaps");

struct Blob {
  uint32_t size = 0;
  char bytes[sizeof(WireHeader) + kMaxFields * sizeof(WireNumber) + sizeof(uint64_t)];
};

// FNV-1a: each step is a bijection, so a change of one byte always shows.
inline uint64_t checksum(const char* bytes, size_t size) {
  uint64_t sum = 14695981039346656037u;
  for (size_t i = 0; i < size; ++i) sum = (sum ^ static_cast<unsigned char>(bytes[i])) * 1099511628211u;
  return sum;
}

template <class Args, size_t kCount>
Blob encode(const char* plugin, const Fields<Args, kCount>& fields, const Numbers& numbers) {
  Blob blob;
  blob.size = sizeof(WireHeader) + kCount * sizeof(WireNumber) + sizeof(uint64_t);
  WireHeader header{};
  std::memcpy(header.magic, kWireMagic, sizeof(kWireMagic));
  header.version = kWireVersion;
  header.size = blob.size;
  std::strncpy(header.plugin, plugin, sizeof(header.plugin) - 1);
  header.count = kCount;
  std::memcpy(blob.bytes, &header, sizeof(header));
  for (size_t i = 0; i < kCount; ++i) {
    WireNumber entry{};
    std::strncpy(entry.name, fields[i].name, sizeof(entry.name) - 1);
    entry.type = fields[i].is_float ? nvinfer1::PluginFieldType::kFLOAT64 : nvinfer1::PluginFieldType::kINT64;
    const auto integer = static_cast<int64_t>(numbers[i]);
    std::memcpy(entry.value, fields[i].is_float ? static_cast<const void*>(&numbers[i]) : &integer,
                sizeof(entry.value));
    std::memcpy(blob.bytes + sizeof(header) + i * sizeof(entry), &entry, sizeof(entry));
  }
  const uint64_t sum = checksum(blob.bytes, blob.size - sizeof(uint64_t));
  std::memcpy(blob.bytes + blob.size - sizeof(sum), &sum, sizeof(sum));
  return blob;
}

// Null, or why these bytes are not a whole blob of this plugin.
inline const char* check_header(const char* plugin, const char* bytes, int32_t length, WireHeader& header) {
  constexpr int32_t kLeast = sizeof(WireHeader) + sizeof(uint64_t);
  if (!bytes || length < kLeast) return reason("%s: got %d bytes, expected at least %d", kWireField, length, kLeast);
  std::memcpy(&header, bytes, sizeof(header));
  if (std::memcmp(header.magic, kWireMagic, sizeof(kWireMagic)) != 0) {
    return reason("%s: got another program's data, expected to find \"%.8s\" first", kWireField, kWireMagic);
  }
  if (header.version != kWireVersion) {
    return reason("%s: got version %u, expected %u; build the engine again", kWireField, header.version, kWireVersion);
  }
  if (header.count > kMaxFields) {
    return reason("%s: got %u attributes, expected at most %d", kWireField, header.count, kMaxFields);
  }
  const uint64_t size = sizeof(WireHeader) + header.count * sizeof(WireNumber) + sizeof(uint64_t);
  if (header.size != size || size != static_cast<uint64_t>(length)) {
    return reason("%s: got %d bytes, expected %d for %u attributes", kWireField, length, static_cast<int>(size),
                  header.count);
  }
  uint64_t sum;
  std::memcpy(&sum, bytes + size - sizeof(sum), sizeof(sum));
  if (sum != checksum(bytes, size - sizeof(sum))) {
    return reason("%s: got a wrong checksum, data is damaged", kWireField);
  }
  if (std::strncmp(header.plugin, plugin, sizeof(header.plugin)) == 0) return nullptr;
  return reason("%s: got %.*s's, expected %s's", kWireField, static_cast<int>(sizeof(header.plugin)), header.plugin,
                plugin);
}

// The attributes of a blob. Null, or what is wrong with it.
template <class Args, size_t kCount>
const char* decode(const char* plugin, const Fields<Args, kCount>& fields, const void* data, int32_t length,
                   Numbers& numbers) {
  const char* bytes = static_cast<const char*>(data);
  WireHeader header;
  if (const char* why = check_header(plugin, bytes, length, header)) return why;
  WireNumber entries[kMaxFields];
  nvinfer1::PluginField given[kMaxFields];
  for (uint32_t i = 0; i < header.count; ++i) {
    std::memcpy(&entries[i], bytes + sizeof(header) + i * sizeof(WireNumber), sizeof(WireNumber));
    entries[i].name[sizeof(entries[i].name) - 1] = '\0';
    given[i] = {entries[i].name, entries[i].value, entries[i].type, 1};
  }
  return read_fields(fields, given, static_cast<int32_t>(header.count), numbers);
}

// The same from the fields of the runtime phase: the blob and nothing else.
template <class Args, size_t kCount>
const char* read_state(const char* plugin, const Fields<Args, kCount>& fields, const nvinfer1::PluginField* given,
                       int32_t count, Numbers& numbers) {
  if (count != 1 || !given || !given->name || std::strcmp(given->name, kWireField) != 0) {
    return reason("%s: got %d other fields, expected this one alone", kWireField, count);
  }
  if (given->type != nvinfer1::PluginFieldType::kINT8) {
    return reason("%s: got type %s, expected INT8", kWireField, type_name(given->type));
  }
  return decode(plugin, fields, given->data, given->length, numbers);
}

}  // namespace dllmc::tensorrt
