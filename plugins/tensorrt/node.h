// A node of an op without TensorRT's calling conventions: which tensors it has, their types, their sizes, its kernel.
//
// An op is described by
//   Args, kName                        the kernel's arguments, the op type
//   kFields, kInputs, kOutputs         tables of fields.h and ports.h, in the order of plugins/op.py
//   axes(args)                         sizes that follow from others
//   sizes(args, sizes)                 fills the sizes of the kernel's arguments
//   contradiction(args, has)           null, or why the attributes do not go together
#pragma once

#include "ports.h"

namespace dllmc::tensorrt {

// Kernels plan by the number of multiprocessors, and the room for their partial results grows with it. No device has
// more; the plan is told no more, so an engine built without a GPU has room enough on every device.
constexpr int32_t kMaxSms = 256;
constexpr Device kTargets[] = {{80, kMaxSms, 163 * 1024}, {86, kMaxSms, 99 * 1024},  {87, kMaxSms, 163 * 1024},
                               {89, kMaxSms, 99 * 1024},  {90, kMaxSms, 227 * 1024}, {110, kMaxSms, 227 * 1024},
                               {120, kMaxSms, 99 * 1024}};

template <class Op>
class Node {
 public:
  using Args = typename Op::Args;

  // Null, or why the attributes contradict each other.
  const char* set(const Numbers& numbers) {
    numbers_ = numbers;
    size_t i = 0;
    for (const auto& field : Op::kFields) {
      if (field.store) field.store(args_, numbers_[i]);
      ++i;
    }
    num_inputs_ = select(Op::kInputs, inputs_);
    num_outputs_ = select(Op::kOutputs, outputs_);
    return Op::contradiction(args_, [this](const char* flag) { return has(flag); });
  }

  const Numbers& numbers() const { return numbers_; }
  int32_t num_inputs() const { return num_inputs_; }
  int32_t num_outputs() const { return num_outputs_; }

  const char* check_counts(int32_t num_inputs, int32_t num_outputs) const {
    if (num_inputs != num_inputs_) return reason("inputs: got %d, expected %d", num_inputs, num_inputs_);
    if (num_outputs != num_outputs_) return reason("outputs: got %d, expected %d", num_outputs, num_outputs_);
    return nullptr;
  }

  // `type_of(i)` tells the type of input i.
  template <class TypeOf>
  DataType output_type(int32_t output, TypeOf type_of) const {
    const Port<Args>& port = *outputs_[output];
    if (port.type != kFloating) return port.type;
    for (int32_t i = 0; port.like && i < num_inputs_; ++i) {
      if (std::strcmp(inputs_[i]->name, port.like) == 0) return type_of(i);
    }
    return DataType::kHALF;
  }

  bool takes_type(int32_t input, DataType type) const {
    const DataType wanted = inputs_[input]->type;
    return wanted == kFloating ? type == DataType::kFLOAT || type == DataType::kHALF : type == wanted;
  }

  // Sizes of all tensors in the form that the engine computes with at run time. Null, or which rank is wrong.
  const char* output_shapes(const nvinfer1::DimsExprs* in, nvinfer1::DimsExprs* out,
                            nvinfer1::IExprBuilder& builder) const {
    for (int32_t i = 0; i < num_inputs_; ++i) {
      Split split;
      if (inputs_[i]->shape[0] == '#') continue;
      if (const char* why = split_shape(inputs_[i]->name, inputs_[i]->shape, in[i].nbDims, split)) return why;
    }
    for (int32_t i = 0; i < num_outputs_; ++i) {
      const char* shape = outputs_[i]->shape;
      out[i].nbDims = 0;
      if (shape[0] == '*') put_lead(in, out[i]);
      for (const char* letter = shape + (shape[0] == '*'); *letter; ++letter) {
        if (out[i].nbDims == Dims::MAX_DIMS) {
          return reason("%s: got too many axes, expected at most 8", outputs_[i]->name);
        }
        const nvinfer1::IDimensionExpr* size = symbolic(*letter, in, builder);
        if (!size) return reason("%s: got no size for axis %d, expected one", outputs_[i]->name, out[i].nbDims);
        out[i].d[out[i].nbDims++] = size;
      }
    }
    return nullptr;
  }

  // Fills the sizes of `args` from `input(i)` and checks every input; outputs are checked where `output` is given.
  template <class InputDims>
  const char* resolve(InputDims input, Args& args, Sizes& sizes) const {
    for (int32_t i = 0; i < num_inputs_; ++i) {
      if (const char* why = sizes.bind(inputs_[i]->name, inputs_[i]->shape, input(i))) return why;
    }
    args = args_;
    Op::sizes(args, sizes);
    if (const char* why = dllmc::check(args)) return why;
    for (const Axis& axis : Op::axes(args)) {
      const int64_t base = axis.base == '1' ? 1 : sizes.letter[static_cast<size_t>(axis.base)];
      sizes.letter[static_cast<size_t>(axis.name)] = axis.denominator ? base * axis.numerator / axis.denominator : 0;
    }
    for (int32_t i = 0; i < num_inputs_; ++i) {
      if (const char* why = sizes.check(inputs_[i]->name, inputs_[i]->shape, input(i))) return why;
    }
    return nullptr;
  }

  template <class OutputDims>
  const char* check_outputs(OutputDims output, const Sizes& sizes) const {
    for (int32_t i = 0; i < num_outputs_; ++i) {
      if (const char* why = sizes.check(outputs_[i]->name, outputs_[i]->shape, output(i))) return why;
    }
    return nullptr;
  }

  template <class InputType, class OutputType>
  const char* check_types(InputType input, OutputType output) const {
    for (int32_t i = 0; i < num_inputs_; ++i) {
      if (!takes_type(i, input(i))) return wrong_type(inputs_[i]->name, input(i), inputs_[i]->type);
    }
    for (int32_t i = 0; i < num_outputs_; ++i) {
      const DataType expected = output_type(i, input);
      if (output(i) != expected) return wrong_type(outputs_[i]->name, output(i), expected);
    }
    return nullptr;
  }

  void bind_input(int32_t i, Args& args, const void* data, DataType type) const {
    inputs_[i]->bind(args, const_cast<void*>(data), type);
  }
  void bind_output(int32_t i, Args& args, void* data, DataType type) const { outputs_[i]->bind(args, data, type); }

  // Room for these arguments and for any fewer rows (kernels.h), on any device.
  static size_t workspace_bytes(const Args& largest) {
    size_t bytes = 0;
    for (const Device& device : kTargets) {
      const size_t needed = dllmc::workspace_bytes(largest, device);
      bytes = needed > bytes ? needed : bytes;
    }
    return bytes;
  }

 private:
  static const char* wrong_type(const char* name, DataType got, DataType expected) {
    return reason("%s: got type %s, expected %s", name, type_name(got), type_name(expected));
  }

  bool has(const char* flag) const {
    size_t i = 0;
    for (const auto& field : Op::kFields) {
      if (std::strcmp(field.name, flag) == 0) return numbers_[i] != 0;
      ++i;
    }
    return false;
  }

  template <size_t kCount>
  int32_t select(const Port<Args> (&ports)[kCount], const Port<Args>* (&present)[kMaxPorts]) const {
    static_assert(kCount <= kMaxPorts);
    int32_t count = 0;
    for (const Port<Args>& port : ports) {
      const bool negated = port.flag && port.flag[0] == '!';
      if (!port.flag || has(port.flag + negated) != negated) present[count++] = &port;
    }
    return count;
  }

  void put_lead(const nvinfer1::DimsExprs* in, nvinfer1::DimsExprs& out) const {
    for (int32_t i = 0; i < num_inputs_; ++i) {
      if (inputs_[i]->shape[0] != '*') continue;
      out.nbDims = in[i].nbDims - static_cast<int32_t>(std::strlen(inputs_[i]->shape)) + 1;
      for (int32_t axis = 0; axis < out.nbDims; ++axis) out.d[axis] = in[i].d[axis];
      return;
    }
  }

  const nvinfer1::IDimensionExpr* symbolic(char letter, const nvinfer1::DimsExprs* in,
                                           nvinfer1::IExprBuilder& builder) const {
    using nvinfer1::DimensionOperation;
    for (const Axis& axis : Op::axes(args_)) {
      if (axis.name != letter) continue;
      if (axis.base == '1') return builder.constant(axis.numerator / axis.denominator);
      const nvinfer1::IDimensionExpr* size = symbolic(axis.base, in, builder);
      if (axis.numerator != 1) size = scaled(size, DimensionOperation::kPROD, axis.numerator, builder);
      if (axis.denominator != 1) size = scaled(size, DimensionOperation::kFLOOR_DIV, axis.denominator, builder);
      return size;
    }
    for (int32_t i = 0; i < num_inputs_; ++i) {
      const char* at = find_axis(inputs_[i]->shape, letter);
      if (at) return in[i].d[in[i].nbDims - static_cast<int32_t>(std::strlen(at))];
    }
    return nullptr;
  }

  static const nvinfer1::IDimensionExpr* scaled(const nvinfer1::IDimensionExpr* size,
                                                nvinfer1::DimensionOperation operation, int64_t by,
                                                nvinfer1::IExprBuilder& builder) {
    const nvinfer1::IDimensionExpr* factor = builder.constant(by);
    return size && factor ? builder.operation(operation, *size, *factor) : nullptr;
  }

  Numbers numbers_{};
  Args args_{};
  const Port<Args>* inputs_[kMaxPorts] = {};
  const Port<Args>* outputs_[kMaxPorts] = {};
  int32_t num_inputs_ = 0, num_outputs_ = 0;
};

}  // namespace dllmc::tensorrt
