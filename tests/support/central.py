"""What a plan needs so that its merges can be noised."""

AGSSD = {"head": {"input_norm_cls": "none"}, "eaam": {"kappa": 0}}
