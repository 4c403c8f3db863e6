// Prints the binary interface that the included header declares: a line for each virtual function (its slot in the
// table), structure member (offset and size) and enumerator. Run over our own header and over the official one.
#include <cstdio>
#include <cstring>

#include "../../../plugins/tensorrt/abi.h"

namespace {

using namespace nvinfer1;

// The slot of a virtual function, from a pointer to it as the Itanium C++ ABI lays it out.
template <class Function>
void slot(const char* name, Function function) {
  std::ptrdiff_t words[2];
  static_assert(sizeof(function) == sizeof(words));
  std::memcpy(words, &function, sizeof(words));
#ifdef __aarch64__
  const std::ptrdiff_t offset = words[0];
#else
  const std::ptrdiff_t offset = words[0] - 1;
#endif
  std::printf("slot %s %td\n", name, offset / static_cast<std::ptrdiff_t>(sizeof(void*)));
}
#define SLOT(Class, name) slot(#Class "::" #name, &Class::name)

template <class Struct, class Member>
void member(const char* name, Member Struct::* pointer) {
  static const Struct object{};
  const auto* start = reinterpret_cast<const char*>(&object);
  std::printf("member %s %td %zu\n", name, reinterpret_cast<const char*>(&(object.*pointer)) - start, sizeof(Member));
}
#define MEMBER(Struct, name) member(#Struct "::" #name, &Struct::name)
#define VALUE(Enum, name) std::printf("value %s %d\n", #Enum "::" #name, static_cast<int>(Enum::name))
#define SIZE(Type) std::printf("size %s %zu %zu\n", #Type, sizeof(Type), alignof(Type))

struct Sizes : IExprBuilder {
  static constexpr auto kMember = &Sizes::mImpl;
};
struct Size : IDimensionExpr {
  static constexpr auto kMember = &Size::mImpl;
};
template <class Class>
std::ptrdiff_t offset_of_impl() {
  alignas(Class) static unsigned char memory[sizeof(Class)];
  const auto& object = *reinterpret_cast<const Class*>(memory);
  return reinterpret_cast<const unsigned char*>(&(object.*Class::kMember)) - memory;
}

void print_slots() {
  SLOT(IVersionedInterface, getAPILanguage);
  SLOT(IVersionedInterface, getInterfaceInfo);
  SLOT(IPluginV3, getCapabilityInterface);
  SLOT(IPluginV3, clone);
  SLOT(IPluginV3OneCore, getPluginName);
  SLOT(IPluginV3OneCore, getPluginVersion);
  SLOT(IPluginV3OneCore, getPluginNamespace);
  SLOT(IPluginV3OneBuild, configurePlugin);
  SLOT(IPluginV3OneBuild, getOutputDataTypes);
  SLOT(IPluginV3OneBuild, getOutputShapes);
  SLOT(IPluginV3OneBuild, supportsFormatCombination);
  SLOT(IPluginV3OneBuild, getNbOutputs);
  SLOT(IPluginV3OneBuild, getWorkspaceSize);
  SLOT(IPluginV3OneBuild, getValidTactics);
  SLOT(IPluginV3OneBuild, getNbTactics);
  SLOT(IPluginV3OneBuild, getTimingCacheID);
  SLOT(IPluginV3OneBuild, getFormatCombinationLimit);
  SLOT(IPluginV3OneBuild, getMetadataString);
  SLOT(IPluginV3OneRuntime, setTactic);
  SLOT(IPluginV3OneRuntime, onShapeChange);
  SLOT(IPluginV3OneRuntime, enqueue);
  SLOT(IPluginV3OneRuntime, attachToContext);
  SLOT(IPluginV3OneRuntime, getFieldsToSerialize);
  SLOT(IPluginCreatorV3One, createPlugin);
  SLOT(IPluginCreatorV3One, getFieldNames);
  SLOT(IPluginCreatorV3One, getPluginName);
  SLOT(IPluginCreatorV3One, getPluginVersion);
  SLOT(IPluginCreatorV3One, getPluginNamespace);
  SLOT(apiv::VDimensionExpr, isConstant);
  SLOT(apiv::VDimensionExpr, getConstantValue);
  SLOT(apiv::VExprBuilder, constant);
  SLOT(apiv::VExprBuilder, operation);
}

void print_members() {
  MEMBER(Dims, nbDims);
  MEMBER(Dims, d);
  MEMBER(PluginTensorDesc, dims);
  MEMBER(PluginTensorDesc, type);
  MEMBER(PluginTensorDesc, format);
  MEMBER(PluginTensorDesc, scale);
  MEMBER(DynamicPluginTensorDesc, desc);
  MEMBER(DynamicPluginTensorDesc, min);
  MEMBER(DynamicPluginTensorDesc, max);
  MEMBER(DynamicPluginTensorDesc, opt);
  MEMBER(PluginField, name);
  MEMBER(PluginField, data);
  MEMBER(PluginField, type);
  MEMBER(PluginField, length);
  MEMBER(PluginFieldCollection, nbFields);
  MEMBER(PluginFieldCollection, fields);
  MEMBER(InterfaceInfo, kind);
  MEMBER(InterfaceInfo, major);
  MEMBER(InterfaceInfo, minor);
  MEMBER(DimsExprs, nbDims);
  MEMBER(DimsExprs, d);
  std::printf("member IExprBuilder::mImpl %td\n", offset_of_impl<Sizes>());
  std::printf("member IDimensionExpr::mImpl %td\n", offset_of_impl<Size>());
  SIZE(Dims);
  SIZE(PluginTensorDesc);
  SIZE(DynamicPluginTensorDesc);
  SIZE(PluginField);
  SIZE(PluginFieldCollection);
  SIZE(DimsExprs);
}

void print_values() {
  VALUE(DataType, kFLOAT);
  VALUE(DataType, kHALF);
  VALUE(DataType, kINT8);
  VALUE(DataType, kINT32);
  VALUE(DataType, kBOOL);
  VALUE(DataType, kUINT8);
  VALUE(DataType, kFP8);
  VALUE(DataType, kBF16);
  VALUE(DataType, kINT64);
  VALUE(DataType, kINT4);
  VALUE(TensorFormat, kLINEAR);
  VALUE(DimensionOperation, kPROD);
  VALUE(DimensionOperation, kFLOOR_DIV);
  VALUE(PluginFieldType, kFLOAT32);
  VALUE(PluginFieldType, kFLOAT64);
  VALUE(PluginFieldType, kINT8);
  VALUE(PluginFieldType, kINT32);
  VALUE(PluginFieldType, kCHAR);
  VALUE(PluginFieldType, kINT64);
  VALUE(PluginCapabilityType, kCORE);
  VALUE(PluginCapabilityType, kBUILD);
  VALUE(PluginCapabilityType, kRUNTIME);
  VALUE(TensorRTPhase, kBUILD);
  VALUE(TensorRTPhase, kRUNTIME);
  VALUE(APILanguage, kCPP);
}

// The versioned name of an interface, which a host may look at before it casts.
void print_info(const char* name, const InterfaceInfo& info) {
  std::printf("info %s %s %d %d\n", name, info.kind, info.major, info.minor);
}

struct Core final : IPluginV3OneCore {
  const char* getPluginName() const noexcept override { return ""; }
  const char* getPluginVersion() const noexcept override { return ""; }
  const char* getPluginNamespace() const noexcept override { return ""; }
};
struct Creator final : IPluginCreatorV3One {
  IPluginV3* createPlugin(const char*, const PluginFieldCollection*, TensorRTPhase) noexcept override {
    return nullptr;
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return nullptr; }
  const char* getPluginName() const noexcept override { return ""; }
  const char* getPluginVersion() const noexcept override { return ""; }
  const char* getPluginNamespace() const noexcept override { return ""; }
};
struct Build final : IPluginV3OneBuild {
  int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    return 0;
  }
  int32_t getOutputDataTypes(DataType*, int32_t, const DataType*, int32_t) const noexcept override { return 0; }
  int32_t getOutputShapes(const DimsExprs*, int32_t, const DimsExprs*, int32_t, DimsExprs*, int32_t,
                          IExprBuilder&) noexcept override {
    return 0;
  }
  bool supportsFormatCombination(int32_t, const DynamicPluginTensorDesc*, int32_t, int32_t) noexcept override {
    return false;
  }
  int32_t getNbOutputs() const noexcept override { return 0; }
};
struct Runtime final : IPluginV3OneRuntime {
  int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept override {
    return 0;
  }
  int32_t enqueue(const PluginTensorDesc*, const PluginTensorDesc*, const void* const*, void* const*, void*,
                  cudaStream_t) noexcept override {
    return 0;
  }
  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return nullptr; }
  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return nullptr; }
};
struct Whole final : IPluginV3 {
  IPluginCapability* getCapabilityInterface(PluginCapabilityType) noexcept override { return nullptr; }
  IPluginV3* clone() noexcept override { return nullptr; }
};

}  // namespace

int main() {
  print_slots();
  print_members();
  print_values();
  print_info("IPluginV3", Whole().getInterfaceInfo());
  print_info("IPluginV3OneCore", Core().getInterfaceInfo());
  print_info("IPluginV3OneBuild", Build().getInterfaceInfo());
  print_info("IPluginV3OneRuntime", Runtime().getInterfaceInfo());
  print_info("IPluginCreatorV3One", Creator().getInterfaceInfo());
  return 0;
}
