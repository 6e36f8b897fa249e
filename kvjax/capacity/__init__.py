"""`kvjax plan`: the memory that a model and its caches take on the devices of another machine."""
