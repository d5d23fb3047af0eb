live.runtime = null; // A build of the site that has ONNX Runtime Web writes its size here.
