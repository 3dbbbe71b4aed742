"""A trained model in files that other programs read: ONNX, and safetensors as timm and torchvision load it."""
