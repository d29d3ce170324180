"""Writing networks for other runtimes: ONNX, TorchScript and torch.export.

`blnet.export` is the whole of it; the parts are
- forms: what an exported network takes and gives, images or recordings;
- programs: tracing with free sizes;
- onnx: ONNX files, and `onnx_bytes` for engines;
- translations: operations that PyTorch translates to ONNX for some sizes only;
- formats: how each format is written and run again;
- parity: the check of a written file;
- metadata: what a file says of its network.
"""
