// What the harness brings in TensorRT's place: memory that a kernel sees, and expressions for sizes.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "abi.h"
#ifndef DLLMC_HOST
#include <cuda_runtime_api.h>
#endif

namespace dllmc::harness {

using namespace nvinfer1;
using Bytes = std::vector<char>;

constexpr size_t kAlignment = 256, kGuardBytes = 256;
constexpr char kPoison = 0x55, kGuard = 0x2A;

// Where a life ended and why; reasons of the plugin itself are on stderr.
struct Failure {
  std::string step;
};
inline void require(bool condition, const std::string& step) {
  if (!condition) throw Failure{step};
}

inline size_t type_bytes(DataType type) {
  constexpr size_t kBytes[] = {4, 2, 1, 4, 1, 1, 1, 2, 8};
  const auto i = static_cast<size_t>(type);
  require(i < std::size(kBytes), "a type without a size");
  return kBytes[i];
}

inline size_t tensor_bytes(const PluginTensorDesc& desc) {
  size_t bytes = type_bytes(desc.type);
  for (int32_t i = 0; i < desc.dims.nbDims; ++i) bytes *= static_cast<size_t>(desc.dims.d[i]);
  return bytes;
}

// Memory that a kernel sees, with a guard behind it.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) {
    const size_t whole = (bytes + kGuardBytes + kAlignment - 1) / kAlignment * kAlignment;
    Bytes start(whole, kPoison);
    std::memset(start.data() + bytes, kGuard, whole - bytes);
#ifdef DLLMC_HOST
    data_ = std::aligned_alloc(kAlignment, whole);
    require(data_, "memory");
    std::memcpy(data_, start.data(), whole);
#else
    require(cudaMalloc(&data_, whole) == cudaSuccess, "memory");
    require(cudaMemcpy(data_, start.data(), whole, cudaMemcpyHostToDevice) == cudaSuccess, "memory");
#endif
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
#ifdef DLLMC_HOST
  ~Memory() { std::free(data_); }
#else
  ~Memory() { cudaFree(data_); }
#endif

  void* data() const { return data_; }

  void write(const Bytes& bytes) {
    if (bytes.empty()) return;
#ifdef DLLMC_HOST
    std::memcpy(data_, bytes.data(), bytes.size());
#else
    require(cudaMemcpy(data_, bytes.data(), bytes.size(), cudaMemcpyHostToDevice) == cudaSuccess, "memory");
#endif
  }

  // What it holds; fails when a kernel wrote behind its end.
  Bytes read() const {
    Bytes all(bytes_ + kGuardBytes);
#ifdef DLLMC_HOST
    std::memcpy(all.data(), data_, all.size());
#else
    require(cudaMemcpy(all.data(), data_, all.size(), cudaMemcpyDeviceToHost) == cudaSuccess, "enqueue");
#endif
    for (size_t i = bytes_; i < all.size(); ++i) require(all[i] == kGuard, "a write behind the end of a tensor");
    all.resize(bytes_);
    return all;
  }

 private:
  size_t bytes_;
  void* data_ = nullptr;
};

// Sizes as TensorRT hands them over, each with its value.
class Size final : public IDimensionExpr, public apiv::VDimensionExpr {
 public:
  explicit Size(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  int64_t value_;
};

class SizeBuilder final : public IExprBuilder, public apiv::VExprBuilder {
 public:
  SizeBuilder() { mImpl = this; }
  const IDimensionExpr* constant(int64_t value) override {
    sizes_.push_back(std::make_unique<Size>(value));
    return sizes_.back().get();
  }
  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& first,
                                  const IDimensionExpr& second) override {
    const int64_t a = first.getConstantValue(), b = second.getConstantValue();
    require(op == DimensionOperation::kPROD || op == DimensionOperation::kFLOOR_DIV, "an operation on sizes");
    require(op == DimensionOperation::kPROD || b != 0, "a division by no size");
    return constant(op == DimensionOperation::kPROD ? a * b : a / b);
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<Size>> sizes_;
};

}  // namespace dllmc::harness
