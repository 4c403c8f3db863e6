// Drives a plugin library as TensorRT does, without TensorRT: the test driver of plugins/tensorrt.
//
//   harness LIBRARY < requests        one JSON line on stdout for each request, reasons on stderr
//
//   list                                  plugins with the names of their fields
//   create PLUGIN build|runtime FIELDS    makes a plugin and destroys it
//   live PLUGIN FIELDS INPUTS FOLDER      a whole life; outputs are written to FOLDER/0, FOLDER/1, ...
//   quit
//   FIELDS  a count, then for each: NAME TYPE LENGTH BYTES     NAME and BYTES: x and hexadecimal digits, - for a null
//                                                              pointer
//   INPUTS  a count, then for each: TYPE RANK SIZES LARGEST PATH     raw bytes of the tensor, - for zeros
//
// A life: fields -> create -> clone -> types, shapes -> every format of every tensor -> configure -> workspace ->
// serialise -> create in the runtime phase -> attach -> shape change -> enqueue -> destroy. With DLLMC_HOST tensors are
// host memory, and the kernels in the library are the host build's; otherwise they live on the current CUDA device.
#include "harness.h"

#include <dlfcn.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <type_traits>

namespace {

using namespace dllmc::harness;
constexpr int32_t kNumTypes = 12, kNumFormats = 13;

// Fields with everything they point to.
struct Fields {
  std::vector<std::unique_ptr<Bytes>> owned;
  std::vector<PluginField> fields;
  PluginFieldCollection collection() const { return {static_cast<int32_t>(fields.size()), fields.data()}; }
  char* keep(Bytes bytes) {
    bytes.push_back('\0');
    owned.push_back(std::make_unique<Bytes>(std::move(bytes)));
    return owned.back()->data();
  }
};

struct Input {
  PluginTensorDesc desc;
  Dims largest;
  std::string path;
};

template <class T>
T read() {
  T value;
  std::cin >> value;
  require(static_cast<bool>(std::cin), "a request");
  return value;
}

char* read_hex(Fields& into) {
  const auto text = read<std::string>();
  if (text == "-") return nullptr;
  Bytes bytes;
  for (size_t i = 1; i + 1 < text.size(); i += 2) {
    bytes.push_back(static_cast<char>(std::stoi(text.substr(i, 2), nullptr, 16)));
  }
  return into.keep(std::move(bytes));
}

Fields read_fields() {
  Fields result;
  const auto count = read<int32_t>();
  for (int32_t i = 0; i < count; ++i) {
    const char* name = read_hex(result);
    const auto type = static_cast<PluginFieldType>(read<int32_t>());
    const auto length = read<int32_t>();
    result.fields.emplace_back(name, read_hex(result), type, length);
  }
  return result;
}

Dims read_dims(int32_t rank) {
  Dims dims{};
  dims.nbDims = rank;
  require(rank >= 0 && rank <= Dims::MAX_DIMS, "a rank");
  for (int32_t i = 0; i < rank; ++i) dims.d[i] = read<int64_t>();
  return dims;
}

std::vector<Input> read_inputs() {
  std::vector<Input> inputs(read<size_t>());
  for (Input& input : inputs) {
    input.desc = {{}, static_cast<DataType>(read<int32_t>()), TensorFormat::kLINEAR, 1.0f};
    const auto rank = read<int32_t>();
    input.desc.dims = read_dims(rank);
    input.largest = read_dims(rank);
    input.path = read<std::string>();
  }
  return inputs;
}

using Plugin = std::unique_ptr<IPluginV3>;

template <class Capability>
Capability& capability(const Plugin& plugin, PluginCapabilityType type) {
  auto* found = static_cast<Capability*>(plugin->getCapabilityInterface(type));
  require(found, "getCapabilityInterface");
  return *found;
}
IPluginV3OneBuild& build(const Plugin& plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}
IPluginV3OneRuntime& runtime(const Plugin& plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

class Library {
 public:
  explicit Library(const char* path) {
    void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) std::fprintf(stderr, "%s\n", dlerror());
    require(handle, "dlopen");
    const auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"));
    const auto set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"));
    require(get && set, "exports");
    set(nullptr);
    int32_t count = 0;
    creators_ = get(count);
    count_ = count;
  }

  IPluginCreatorV3One& find(const std::string& name) const {
    for (int32_t i = 0; i < count_; ++i) {
      require(std::strcmp(creators_[i]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0, "getInterfaceInfo");
      auto& creator = *static_cast<IPluginCreatorV3One*>(creators_[i]);
      if (name == creator.getPluginName()) return creator;
    }
    throw Failure{"an unknown plugin"};
  }

  // Plugins and the names and types of their fields.
  std::string describe() const {
    std::string text;
    for (int32_t i = 0; i < count_; ++i) {
      auto& creator = *static_cast<IPluginCreatorV3One*>(creators_[i]);
      const PluginFieldCollection& names = *creator.getFieldNames();
      text += std::string(i ? ", \"" : "\"") + creator.getPluginName() + "\": {";
      for (int32_t field = 0; field < names.nbFields; ++field) {
        text += std::string(field ? ", \"" : "\"") + names.fields[field].name + "\": ";
        text += std::to_string(static_cast<int32_t>(names.fields[field].type));
      }
      text += "}";
    }
    return "{" + text + "}";
  }

 private:
  IPluginCreatorInterface* const* creators_;
  int32_t count_;
};

// A list in JSON.
template <class Values>
std::string list(const Values& values) {
  std::string text;
  for (const auto& value : values) {
    if constexpr (std::is_arithmetic_v<std::decay_t<decltype(value)>>) {
      text += (text.empty() ? "" : ", ") + std::to_string(value);
    } else {
      text += (text.empty() ? "" : ", ") + value;
    }
  }
  return "[" + text + "]";
}

std::string list(const Dims& dims) { return list(std::vector<int64_t>(dims.d, dims.d + dims.nbDims)); }

// The descriptors of all tensors of a node, as the builder and as the runtime hand them over.
struct Tensors {
  std::vector<DynamicPluginTensorDesc> dynamic;  // inputs, then outputs
  std::vector<PluginTensorDesc> exact;
  int32_t num_in = 0, num_out = 0;
  const PluginTensorDesc* out() const { return exact.data() + num_in; }
};

DynamicPluginTensorDesc dynamic_desc(const PluginTensorDesc& desc, const Dims& largest) {
  DynamicPluginTensorDesc result{desc, desc.dims, largest, largest};
  for (int32_t i = 0; i < largest.nbDims; ++i) {
    if (largest.d[i] != desc.dims.d[i]) result.desc.dims.d[i] = -1;
  }
  return result;
}

// The output's sizes for inputs of these sizes.
template <class DimsOf>
std::vector<Dims> output_dims(const Plugin& plugin, const std::vector<Input>& inputs, int32_t num_out, DimsOf dims_of) {
  SizeBuilder builder;
  std::vector<DimsExprs> in(inputs.size()), out(static_cast<size_t>(num_out));
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Dims& dims = dims_of(inputs[i]);
    in[i].nbDims = dims.nbDims;
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) in[i].d[axis] = builder.constant(dims.d[axis]);
  }
  require(build(plugin).getOutputShapes(in.data(), static_cast<int32_t>(in.size()), nullptr, 0, out.data(), num_out,
                                        builder) == 0,
          "getOutputShapes");
  std::vector<Dims> result(out.size());
  for (size_t i = 0; i < out.size(); ++i) {
    result[i].nbDims = out[i].nbDims;
    for (int32_t axis = 0; axis < out[i].nbDims; ++axis) result[i].d[axis] = out[i].d[axis]->getConstantValue();
  }
  return result;
}

Tensors describe(const Plugin& plugin, const std::vector<Input>& inputs) {
  Tensors tensors;
  tensors.num_in = static_cast<int32_t>(inputs.size());
  tensors.num_out = build(plugin).getNbOutputs();
  std::vector<DataType> in, out(static_cast<size_t>(tensors.num_out));
  for (const Input& input : inputs) in.push_back(input.desc.type);
  require(build(plugin).getOutputDataTypes(out.data(), tensors.num_out, in.data(), tensors.num_in) == 0,
          "getOutputDataTypes");
  const auto exact = output_dims(plugin, inputs, tensors.num_out, [](const Input& i) { return i.desc.dims; });
  const auto largest = output_dims(plugin, inputs, tensors.num_out, [](const Input& i) { return i.largest; });
  for (const Input& input : inputs) {
    tensors.exact.push_back(input.desc);
    tensors.dynamic.push_back(dynamic_desc(input.desc, input.largest));
  }
  for (size_t i = 0; i < out.size(); ++i) {
    tensors.exact.push_back({exact[i], out[i], TensorFormat::kLINEAR, 1.0f});
    tensors.dynamic.push_back(dynamic_desc(tensors.exact.back(), largest[i]));
  }
  return tensors;
}

// For each tensor, the types that the plugin takes when those before it are as described.
std::string try_formats(const Plugin& plugin, const Tensors& tensors) {
  std::vector<std::string> taken;
  for (size_t position = 0; position < tensors.dynamic.size(); ++position) {
    std::vector<int32_t> types;
    for (int32_t type = 0; type < kNumTypes; ++type) {
      for (int32_t format = 0; format < kNumFormats; ++format) {
        auto tried = tensors.dynamic;
        tried[position].desc.type = static_cast<DataType>(type);
        tried[position].desc.format = static_cast<TensorFormat>(format);
        const bool takes = build(plugin).supportsFormatCombination(static_cast<int32_t>(position), tried.data(),
                                                                   tensors.num_in, tensors.num_out);
        require(!takes || format == 0, "a format other than linear");
        if (takes) types.push_back(type);
      }
    }
    taken.push_back(list(types));
  }
  return list(taken);
}

Plugin create(const Library& library, const std::string& name, const Fields& fields, TensorRTPhase phase) {
  const PluginFieldCollection collection = fields.collection();
  return Plugin(library.find(name).createPlugin("node_0", &collection, phase));
}

Fields serialise(const Plugin& plugin) {
  const PluginFieldCollection* given = runtime(plugin).getFieldsToSerialize();
  require(given, "getFieldsToSerialize");
  Fields copy;
  for (int32_t i = 0; i < given->nbFields; ++i) {
    const PluginField& field = given->fields[i];
    require(field.type == PluginFieldType::kINT8, "getFieldsToSerialize");
    const char* bytes = static_cast<const char*>(field.data);
    const char* name = copy.keep(Bytes(field.name, field.name + std::strlen(field.name)));
    copy.fields.emplace_back(name, copy.keep(Bytes(bytes, bytes + field.length)), field.type, field.length);
  }
  return copy;
}

std::string hex(const PluginField& field) {
  std::string text;
  for (int32_t i = 0; i < field.length; ++i) {
    char digits[3];
    std::snprintf(digits, sizeof(digits), "%02x", static_cast<const unsigned char*>(field.data)[i]);
    text += digits;
  }
  return text;
}

// Whether each output is refused when it has one value too many.
bool refuses_other_outputs(IPluginV3OneRuntime& stage, const Tensors& tensors) {
  for (int32_t i = 0; i < tensors.num_out; ++i) {
    auto changed = tensors.exact;
    ++changed[static_cast<size_t>(tensors.num_in + i)].dims.d[0];
    const PluginTensorDesc* out = changed.data() + tensors.num_in;
    if (stage.onShapeChange(changed.data(), tensors.num_in, out, tensors.num_out) == 0) return false;
  }
  return true;
}

void run(const Plugin& plugin, const std::vector<Input>& inputs, const Tensors& tensors, size_t workspace_bytes,
         const std::string& folder) {
  std::vector<std::unique_ptr<Memory>> memories;
  std::vector<const void*> in;
  std::vector<void*> out;
  for (const Input& input : inputs) {
    Bytes bytes(tensor_bytes(input.desc));
    if (input.path != "-") {
      std::ifstream file(input.path, std::ios::binary);
      require(static_cast<bool>(file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))), input.path);
    }
    memories.push_back(std::make_unique<Memory>(bytes.size()));
    memories.back()->write(bytes);
    in.push_back(memories.back()->data());
  }
  for (int32_t i = 0; i < tensors.num_out; ++i) {
    memories.push_back(std::make_unique<Memory>(tensor_bytes(tensors.out()[i])));
    out.push_back(memories.back()->data());
  }
  const Memory workspace(workspace_bytes);
  IPluginV3OneRuntime& stage = runtime(plugin);
  require(stage.setTactic(0) == 0, "setTactic");
  require(stage.onShapeChange(tensors.exact.data(), tensors.num_in, tensors.out(), tensors.num_out) == 0,
          "onShapeChange");
  require(refuses_other_outputs(stage, tensors), "onShapeChange with another output");
  require(stage.enqueue(tensors.exact.data(), tensors.out(), in.data(), out.data(), workspace.data(), nullptr) == 0,
          "enqueue");
  workspace.read();
  for (size_t i = 0; i < memories.size(); ++i) {
    const Bytes bytes = memories[i]->read();
    if (i < inputs.size()) continue;
    std::ofstream file(folder + "/" + std::to_string(i - inputs.size()), std::ios::binary);
    require(static_cast<bool>(file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()))), folder);
  }
}

std::string live(const Library& library) {
  const auto name = read<std::string>();
  const Fields fields = read_fields();
  const std::vector<Input> inputs = read_inputs();
  const auto folder = read<std::string>();
  Plugin made = create(library, name, fields, TensorRTPhase::kBUILD);
  require(static_cast<bool>(made), "createPlugin");
  Plugin plugin(made->clone());
  require(static_cast<bool>(plugin), "clone");
  made.reset();
  auto& core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
  require(name == core.getPluginName(), "getPluginName");
  const std::string spaced = std::string(core.getPluginNamespace()) + " " + core.getPluginVersion();
  const Tensors tensors = describe(plugin, inputs);
  const std::string formats = try_formats(plugin, tensors);
  IPluginV3OneBuild& stage = build(plugin);
  const DynamicPluginTensorDesc* in = tensors.dynamic.data();
  require(stage.configurePlugin(in, tensors.num_in, in + tensors.num_in, tensors.num_out) == 0, "configurePlugin");
  require(stage.getNbTactics() == 0, "getNbTactics");
  const size_t workspace = stage.getWorkspaceSize(in, tensors.num_in, in + tensors.num_in, tensors.num_out);
  const std::string timing = stage.getTimingCacheID() ? stage.getTimingCacheID() : "";
  const Fields state = serialise(plugin);
  plugin.reset();
  made = create(library, name, state, TensorRTPhase::kRUNTIME);
  require(static_cast<bool>(made), "createPlugin from what was serialised");
  require(hex(serialise(made).fields.at(0)) == hex(state.fields.at(0)), "a state that stays the same");
  Plugin attached(runtime(made).attachToContext(nullptr));
  require(static_cast<bool>(attached), "attachToContext");
  run(attached, inputs, tensors, workspace, folder);
  std::vector<std::string> shapes;
  std::vector<int32_t> types;
  for (int32_t i = 0; i < tensors.num_out; ++i) {
    shapes.push_back(list(tensors.out()[i].dims));
    types.push_back(static_cast<int32_t>(tensors.out()[i].type));
  }
  return "{\"plugin\": \"" + spaced + "\", \"shapes\": " + list(shapes) + ", \"types\": " + list(types) +
         ", \"formats\": " + formats + ", \"workspace\": " + std::to_string(workspace) + ", \"timing_id\": \"" +
         timing + "\", \"state\": \"" + hex(state.fields.at(0)) + "\"}";
}

std::string answer(const Library& library, const std::string& request) {
  if (request == "list") return library.describe();
  if (request == "live") return live(library);
  require(request == "create", "a request");
  const auto name = read<std::string>();
  const auto phase = read<std::string>();
  const Fields fields = read_fields();
  const Plugin made = create(library, name, fields, phase == "build" ? TensorRTPhase::kBUILD : TensorRTPhase::kRUNTIME);
  return std::string("{\"made\": ") + (made ? "true}" : "false}");
}

}  // namespace

int main(int argc, char** argv) try {
  require(argc == 2, "one argument, a library");
  const Library library(argv[1]);
  std::string request;
  while (std::cin >> request && request != "quit") {
    try {
      std::cout << answer(library, request) << std::endl;
    } catch (const Failure& failure) {
      std::cout << "{\"failed\": \"" << failure.step << "\"}" << std::endl;
    }
  }
  return 0;
} catch (const Failure& failure) {
  std::fprintf(stderr, "harness: failed at %s\n", failure.step.c_str());
  return 1;
}
