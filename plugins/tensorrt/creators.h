// One creator an op, for exports.cpp.
#pragma once

#include "abi.h"

namespace dllmc::tensorrt {

nvinfer1::IPluginCreatorInterface* quantize_creator();
nvinfer1::IPluginCreatorInterface* int4_linear_creator();
nvinfer1::IPluginCreatorInterface* int8_linear_creator();
nvinfer1::IPluginCreatorInterface* head_creator();
nvinfer1::IPluginCreatorInterface* rotate_creator();

}  // namespace dllmc::tensorrt
