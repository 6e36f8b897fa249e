"""`kvjax plan`: the bytes that a model takes on devices of another machine."""
