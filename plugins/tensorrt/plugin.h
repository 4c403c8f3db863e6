// One template over an op's description (node.h) makes its TensorRT plugin and its creator.
//
// Types of tensors: codes and weights INT8 (two 4-bit codes a byte), scales and tables FLOAT, zero points and states
// INT32, ids INT64, activations FLOAT or HALF. An op has no attribute for the type of a floating output, so it follows
// from an input:
//   a linear's y     the type of `residual`; HALF without one
//   DllmcRotate's y  the type of `x`
// So the residual stream is FLOAT from the embedding to the last norm as soon as the embedding is cast to FLOAT: the
// output and down projections add to it and stay FLOAT; queries, keys, values and SwiGLU, which add to nothing, are
// HALF. A linear without residual whose consumer needs FLOAT gets a Cast behind it.
// In a network that is not strongly typed (an option of TensorRT 10) the builder would be free to make that stream
// HALF.
//
// Nothing throws: memory comes from `new (std::nothrow)`, everything else has a fixed size. A plugin keeps no state of
// a run: every call reads the descriptors it is given, so contexts can share what they like.
#pragma once

#include <cinttypes>
#include <cstdio>
#include <new>

#include "node.h"
#include "wire.h"

namespace dllmc::tensorrt {

// One line on stderr. Names come from models, so what a terminal would act on is shown as "?".
inline void print_refusal(const char* plugin, const char* node, const char* why) {
  char line[512];
  std::snprintf(line, sizeof(line), "dllmc: %s%s%s: %s", plugin, node[0] ? " " : "", node, why);
  for (char* at = line; *at; ++at) *at = *at < ' ' || *at > '~' ? '?' : *at;
  std::fprintf(stderr, "%s\n", line);
}

// The device under the current context. Null, or why it does not run these kernels.
inline const char* supported_device(Device& device) {
  if (const char* why = current_device(device)) return why;
  if (const char* why = check_device(device)) return why;
  device.num_sms = device.num_sms < kMaxSms ? device.num_sms : kMaxSms;
  return nullptr;
}

template <class Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
  using TensorDesc = nvinfer1::PluginTensorDesc;
  using DynamicDesc = nvinfer1::DynamicPluginTensorDesc;
  using Args = typename Op::Args;

 public:
  Plugin(const Node<Op>& node, const char* name) : node_(node), state_(encode(Op::kName, Op::kFields, node.numbers())) {
    std::snprintf(name_, sizeof(name_), "%s", name ? name : "");
    int used = std::snprintf(description_, sizeof(description_), "state=%" PRIu32, kWireVersion);
    for (size_t i = 0; i < std::size(Op::kFields); ++i) {
      const size_t room = sizeof(description_) - static_cast<size_t>(used);
      used += std::snprintf(description_ + used, room, ",%s=%.9g", Op::kFields[i].name, node.numbers()[i]);
    }
  }

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    if (type == nvinfer1::PluginCapabilityType::kCORE) return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    if (type == nvinfer1::PluginCapabilityType::kBUILD) return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    if (type == nvinfer1::PluginCapabilityType::kRUNTIME) return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    return nullptr;
  }
  Plugin* clone() noexcept override { return new (std::nothrow) Plugin(*this); }

  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return node_.num_outputs(); }

  int32_t getOutputDataTypes(DataType* out, int32_t num_out, const DataType* in,
                             int32_t num_in) const noexcept override {
    if (const char* why = node_.check_counts(num_in, num_out)) return refuse(why);
    for (int32_t i = 0; i < num_out; ++i) {
      out[i] = node_.output_type(i, [in](int32_t input) { return in[input]; });
    }
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t num_in, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* out, int32_t num_out,
                          nvinfer1::IExprBuilder& builder) noexcept override {
    if (const char* why = node_.check_counts(num_in, num_out)) return refuse(why);
    const char* why = node_.output_shapes(in, out, builder);
    return why ? refuse(why) : 0;
  }

  bool supportsFormatCombination(int32_t position, const DynamicDesc* tensors, int32_t num_in,
                                 int32_t num_out) noexcept override {
    if (node_.check_counts(num_in, num_out) || position < 0 || position >= num_in + num_out) return false;
    const TensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position < num_in) return node_.takes_type(position, tensor.type);
    const auto input_type = [tensors](int32_t input) { return tensors[input].desc.type; };
    return tensor.type == node_.output_type(position - num_in, input_type);
  }

  int32_t configurePlugin(const DynamicDesc* in, int32_t num_in, const DynamicDesc*,
                          int32_t num_out) noexcept override {
    if (const char* why = node_.check_counts(num_in, num_out)) return refuse(why);
    for (const Dims DynamicDesc::* bound : {&DynamicDesc::min, &DynamicDesc::max}) {
      Args args;
      Sizes sizes;
      const auto input = [in, bound](int32_t i) -> const Dims& { return in[i].*bound; };
      if (const char* why = node_.resolve(input, args, sizes)) return refuse(why);
    }
    return 0;
  }

  size_t getWorkspaceSize(const DynamicDesc* in, int32_t num_in, const DynamicDesc*,
                          int32_t num_out) const noexcept override {
    Args args;
    Sizes sizes;
    const char* why = node_.check_counts(num_in, num_out);
    if (!why) why = node_.resolve([in](int32_t i) -> const Dims& { return in[i].max; }, args, sizes);
    if (!why) return Node<Op>::workspace_bytes(args);
    refuse(why);
    return 0;
  }

  const char* getTimingCacheID() noexcept override { return description_; }
  const char* getMetadataString() noexcept override { return description_; }

  int32_t onShapeChange(const TensorDesc* in, int32_t num_in, const TensorDesc* out,
                        int32_t num_out) noexcept override {
    Args args;
    if (const char* why = node_.check_counts(num_in, num_out)) return refuse(why);
    const char* why = read_tensors(in, out, args);
    return why ? refuse(why) : 0;
  }

  int32_t enqueue(const TensorDesc* in, const TensorDesc* out, const void* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override {
    Args args;
    if (const char* why = read_tensors(in, out, args)) return refuse(why);
    if (device_.arch == 0) {
      if (const char* why = supported_device(device_)) return refuse(why);
    }
    for (int32_t i = 0; i < node_.num_inputs(); ++i) node_.bind_input(i, args, inputs[i], in[i].type);
    for (int32_t i = 0; i < node_.num_outputs(); ++i) node_.bind_output(i, args, outputs[i], out[i].type);
    const char* why = dllmc::run(args, Launch{stream, workspace, device_, Path::kAuto});
    return why ? refuse(why) : 0;
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override {
    Device device;
    if (const char* why = supported_device(device)) {
      refuse(why);
      return nullptr;
    }
    Plugin* attached = clone();
    if (attached) attached->device_ = device;
    return attached;
  }

  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override {
    state_field_ = {kWireField, state_.bytes, nvinfer1::PluginFieldType::kINT8, static_cast<int32_t>(state_.size)};
    state_fields_ = {1, &state_field_};
    return &state_fields_;
  }

 private:
  int32_t refuse(const char* why) const {
    print_refusal(Op::kName, name_, why);
    return 1;
  }

  // Sizes and types of the tensors of a run. Null, or why they are not this node's.
  const char* read_tensors(const TensorDesc* in, const TensorDesc* out, Args& args) const {
    Sizes sizes;
    const auto input = [in](int32_t i) -> const Dims& { return in[i].dims; };
    const auto output = [out](int32_t i) -> const Dims& { return out[i].dims; };
    if (const char* why = node_.resolve(input, args, sizes)) return why;
    if (const char* why = node_.check_outputs(output, sizes)) return why;
    return node_.check_types([in](int32_t i) { return in[i].type; }, [out](int32_t i) { return out[i].type; });
  }

  Node<Op> node_;
  Blob state_;
  Device device_{};  // arch 0: not asked for yet
  char name_[128];
  char description_[512];
  nvinfer1::PluginField state_field_;  // both are filled at each request: a copy's must not point into its original
  nvinfer1::PluginFieldCollection state_fields_{};
};

template <class Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() {
    int32_t count = 0;
    for (const auto& field : Op::kFields) {
      const auto type = field.is_float ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT32;
      fields_[count++] = {field.name, nullptr, type, 1};
    }
    names_ = {count, fields_};
  }

  // Null where a field is not what the op expects; the reason goes to stderr, because ILogger differs among releases.
  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    Numbers numbers{};
    Node<Op> node;
    const nvinfer1::PluginField* fields = given ? given->fields : nullptr;
    const int32_t count = given ? given->nbFields : 0;
    const char* why = phase == nvinfer1::TensorRTPhase::kBUILD
                          ? read_fields(Op::kFields, fields, count, numbers)
                          : read_state(Op::kName, Op::kFields, fields, count, numbers);
    if (!why) why = node.set(numbers);
    if (!why) return new (std::nothrow) Plugin<Op>(node, name);
    print_refusal(Op::kName, name ? name : "", why);
    return nullptr;
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }
  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  nvinfer1::PluginField fields_[kMaxFields];
  nvinfer1::PluginFieldCollection names_{};
};

// Never destroyed: the registry may outlive this library's statics.
template <class Op>
nvinfer1::IPluginCreatorInterface* creator() {
  alignas(Creator<Op>) static unsigned char memory[sizeof(Creator<Op>)];
  static auto* const only = new (memory) Creator<Op>();
  return only;
}

}  // namespace dllmc::tensorrt
