"""Snippets of Python from which random modules are put together; see :mod:`python_modules` for how they are written."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ARGUMENTS", "FEATURES", "FOLDS", "PREAMBLE", "RETURNS", "STYLES", "Arguments"]

FOLDS: dict[str, str] = {
    "conv_bn": """
        init: self.conv@ = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        init: self.bn@ = nn.BatchNorm2d(4)
        body: x = self.bn@(self.conv@(x))
        """,
    "conv_bn_relu": """
        init: self.conv@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.bn@ = nn.BatchNorm2d(4)
        body: x = F.relu(self.bn@(self.conv@(x)))
        """,
    "point_bn": """
        init: self.conv@ = nn.Conv2d(4, 4, 1)
        init: self.bn@ = nn.BatchNorm2d(4)
        body: x = self.bn@(self.conv@(x)).sigmoid()
        """,
    "sequential": """
        init: self.seq@ = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        body: x = self.seq@(x)
        """,
    "parallel": """
        init: self.a@ = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        init: self.b@ = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        init: self.c@ = nn.BatchNorm2d(4)
        body: x = F.relu(self.a@(x) + self.b@(x) + self.c@(x))
        """,
    "two_branches": """
        init: self.a@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.b@ = nn.Conv2d(4, 4, 1)
        body: x = torch.relu(self.a@(x) + self.b@(x))
        """,
    "residual": """
        init: self.conv@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.bn@ = nn.BatchNorm2d(4)
        body: x = (x + self.bn@(self.conv@(x))).tanh()
        """,
    "basic_block": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        init: self.n@ = nn.BatchNorm2d(4)
        init: self.d@ = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        init: self.o@ = nn.BatchNorm2d(4)
        init: self.act@ = nn.ReLU(inplace=True)
        body: y@ = self.act@(self.n@(self.c@(x)))
        body: x = self.act@(self.o@(self.d@(y@)) + x)
        """,
    "in_sequence": """
        init: self.a@ = nn.Conv2d(4, 6, 1, bias=False)
        init: self.bn@ = nn.BatchNorm2d(6)
        init: self.b@ = nn.Conv2d(6, 4, 1)
        body: x = F.gelu(self.b@(self.bn@(self.a@(x))))
        """,
    "halves": """
        init: self.a@ = nn.Conv2d(2, 2, 3, padding=1)
        init: self.b@ = nn.Conv2d(2, 2, 3, padding=1)
        body: p@, q@ = x.chunk(2, 1)
        body: x = torch.cat([self.a@(p@), self.b@(q@)], 1)
        """,
    "scale": """
        init: self.conv@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.gamma@ = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        body: x = F.silu(self.gamma@ * self.conv@(x))
        """,
    "depthwise": """
        init: self.a@ = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        init: self.b@ = nn.Conv2d(4, 4, 1, groups=4)
        init: self.bn@ = nn.BatchNorm2d(4)
        body: x = F.relu6(self.bn@(self.a@(x) + self.b@(x) + x))
        """,
    "linear_bn": """
        init: self.fc@ = nn.Linear(4, 4)
        init: self.bn@ = nn.BatchNorm1d(4)
        body: g@ = self.bn@(self.fc@(x.mean((2, 3))))
        body: x = x * g@.sigmoid()[:, :, None, None]
        """,
    "branch_list": """
        init: self.convs@ = nn.ModuleList(nn.Conv2d(4, 4, k, padding=k // 2) for k in (1, 3, 5))
        init: self.norms@ = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        body: x = torch.relu(sum(n(c(x)) for c, n in zip(self.convs@, self.norms@)))
        """,
    "pool_branch": """
        init: self.a@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.p@ = nn.AvgPool2d(3, 1, 1)
        body: x = torch.relu(self.a@(x) + self.p@(x))
        """,
    "transposed": """
        init: self.up@ = nn.ConvTranspose2d(4, 4, 3, padding=1)
        init: self.bn@ = nn.BatchNorm2d(4)
        body: x = self.bn@(self.up@(x)).relu()
        """,
    "functional": """
        init: self.weight@ = nn.Parameter(torch.randn(4, 4, 3, 3))
        init: self.bn@ = nn.BatchNorm2d(4)
        body: x = self.bn@(F.conv2d(x, self.weight@, padding=1)).relu()
        """,
    "down_and_up": """
        init: self.conv@ = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        init: self.bn@ = nn.BatchNorm2d(4)
        body: x = x + F.interpolate(self.bn@(self.conv@(x)), size=x.shape[-2:])
        """,
    "tail": """
        init: self.a@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.b@ = nn.Conv2d(4, 4, 1)
        body: x = self.a@(x) + self.b@(x)
        """,
}
"""What folds or takes blocks; each keeps the shape."""

FEATURES: dict[str, str] = {
    # types
    "isinstance": """
        body: if isinstance(x, torch.Tensor):
        body:     x = x * 0.5
        INNER
        """,
    "not_a_tensor": """
        body: if not isinstance(x, torch.Tensor):
        body:     raise TypeError("a tensor is needed")
        """,
    "isinstance_result": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        body: y@ = self.c@(x)
        body: x = y@.relu() if isinstance(y@, (Tensor, list)) else x
        """,
    "is_tensor": """
        body: if torch.is_tensor(x):
        INNER
        """,
    "jit_isinstance": """
        body: if not torch.jit.isinstance(x, list[Tensor]):
        INNER
        """,
    "hasattr_tensor": """
        body: if hasattr(x, "permute") and not hasattr(x, "tensors"):
        INNER
        """,
    "hasattr_method": """
        init: self.c@ = nn.Conv2d(4, 4, 1)
        body: y@ = self.c@(x)
        body: x = y@ if hasattr(y@, "no_such_method") else -y@
        """,
    "type_is": """
        body: if type(x) is torch.Tensor:
        body:     x = x - 0.25
        """,
    "getattr_default": """
        body: x = x + (1.0 if getattr(x, "is_nested", False) else 0.5)
        """,
    "callable_test": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        body: x = self.c@(x) if callable(self.c@) else x
        """,
    # questions about shapes
    "assert_dim": """
        body: assert x.dim() == 4, f"expected 4 dimensions, got {x.dim()}"
        INNER
        """,
    "numel": """
        body: if x.numel() == 0:
        body:     return x
        """,
    "channels_question": """
        body: if x.shape[1] != 4:
        body:     x = x.repeat(1, 2, 1, 1)
        """,
    "raise_channels": """
        body: if x.shape[1] not in (1, 4):
        body:     raise ValueError(f"got {x.shape[1]} channels")
        """,
    "sizes_differ": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: y@ = self.n@(self.c@(x))
        body: if x.size() != y@.size():
        body:     y@ = F.interpolate(y@, size=x.shape[2:])
        body: x = x + y@
        """,
    "size_dependent": """
        body: if x.shape[-1] > 10:
        body:     x = x * 2
        """,
    "batch_dependent": """
        body: if x.shape[0] % 2:
        body:     x = -x
        """,
    "odd_size": """
        body: if x.shape[2] % 2 == 1:
        body:     x = F.pad(x, (0, 0, 0, 1))[:, :, :-1]
        """,
    "requires_grad": """
        body: if x.requires_grad and torch.is_grad_enabled():
        body:     x = x * 1.0
        """,
    "ndim": """
        body: x = x.unsqueeze(0) if x.ndim == 3 else x
        """,
    "len_batch": """
        body: x = x / len(x) * len(x)
        """,
    "iterate_chunk": """
        init: self.h@ = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(2))
        body: parts@ = []
        body: for layer, part in zip(self.h@, x.chunk(2, 1)):
        body:     parts@.append(layer(part))
        body: x = torch.cat(parts@, 1)
        """,
    "iterate_split": """
        body: x = torch.cat([p * (k + 1) for k, p in enumerate(x.split([1, 3], 1))], 1)
        """,
    "iterate_unbind": """
        body: x = torch.stack([p.sigmoid() for p in x.unbind(1)], 1)
        """,
    "iterate_batch": """
        body: x = torch.stack([p + 0.1 for p in x])
        """,
    "unpack_shape": """
        body: b@, c@, h@, w@ = x.shape
        body: x = x.reshape(b@, c@, h@ * w@).reshape(b@, c@, h@, w@)
        """,
    "int_of_size": """
        top: def half@(x):
        top:     margin = int(x.shape[-1]) // 2
        top:     return x * (1.0 + 0.01 * margin)
        body: x = half@(x)
        """,
    "range_of_size": """
        body: x = x + sum(0.01 * k for k in range(x.shape[2]))
        """,
    "dtype_question": """
        body: if x.dtype == torch.float64 and x.is_floating_point():
        INNER
        body: x = x.to(torch.float64)
        """,
    "device_question": """
        body: if x.device.type == "cpu":
        INNER
        """,
    "is_contiguous": """
        body: x = x if x.is_contiguous() else x.contiguous()
        """,
    "shape_in_set": """
        body: if tuple(x.shape[2:]) in {(7, 7), (9, 9)}:
        body:     x = x + 1
        """,
    # modes
    "if_training": """
        body: if self.training:
        body:     x = x * 1.5
        INNER
        """,
    "training_only_branch": """
        init: self.aux@ = nn.Conv2d(4, 4, 3, padding=1)
        body: if self.training:
        body:     x = x + self.aux@(x)
        """,
    "eval_only_branch": """
        init: self.aux@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.auxn@ = nn.BatchNorm2d(4)
        body: if not self.training:
        body:     x = x + self.auxn@(self.aux@(x))
        """,
    "dropout": """
        init: self.drop@ = nn.Dropout(0.3)
        body: x = self.drop@(x)
        """,
    "functional_dropout": """
        body: x = F.dropout(x, 0.2, training=self.training)
        """,
    "mc_dropout": """
        body: x = F.dropout(x, 0.2)
        """,
    "norm_in_batch_mode": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        after: M.n@.train()
        """,
    "norm_frozen_by_train": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        methods: def train(self, mode=True):
        methods:     super().train(mode)
        methods:     self.n@.eval()
        methods:     return self
        body: x = self.n@(self.c@(x))
        """,
    "norm_always_trains": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        methods: def train(self, mode=True):
        methods:     super().train(mode)
        methods:     self.n@.train(True)
        methods:     return self
        body: x = self.n@(self.c@(x))
        """,
    "train_computes": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        init: self.merged@ = False
        methods: def train(self, mode=True):
        methods:     super().train(mode)
        methods:     if mode == self.merged@:
        methods:         with torch.no_grad():
        methods:             self.c@.weight.mul_(0.5 if mode else 2.0)
        methods:         self.merged@ = not mode
        methods:     return self
        body: x = self.n@(self.c@(x))
        body: x = x if self.merged@ else x + 1
        """,
    "norm_without_statistics": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4, track_running_stats=False)
        body: x = self.n@(self.c@(x))
        """,
    "norm_switched": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: self.n@.train(x.shape[0] > 2)
        body: x = self.n@(self.c@(x))
        """,
    "conv_eval_norm_functional": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: n@ = self.n@
        body: x = F.batch_norm(self.c@(x), n@.running_mean, n@.running_var, n@.weight, n@.bias, self.training)
        """,
    # randomness
    "rand_added": """
        body: x = x + torch.rand(1, 4, 1, 1)
        """,
    "randn_like": """
        body: x = x + 0.1 * torch.randn_like(x)
        """,
    "randn_of_shape": """
        body: x = x + torch.randn(x.shape[0], 1, 1, 1, dtype=x.dtype)
        """,
    "bernoulli": """
        body: x = x * torch.bernoulli(torch.full((1, 4, 1, 1), 0.7))
        """,
    "randperm": """
        body: x = x[:, torch.randperm(4)]
        """,
    "noise_inside": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x) + torch.rand(4, 1, 1))
        """,
    "normal_in_place": """
        body: x = x + torch.empty(1, 4, 1, 1).normal_()
        """,
    "python_random": """
        body: if random.random() < 0.5:
        body:     x = x * 1.5
        """,
    "python_random_factor": """
        body: x = x * random.uniform(0.5, 1.5)
        """,
    "numpy_random": """
        body: x = x * float(np.random.rand())
        """,
    "numpy_random_channels": """
        body: x = x * torch.from_numpy(np.random.rand(1, 4, 1, 1))
        """,
    "stochastic_depth": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        body: if torch.rand(1) < 0.5:
        body:     x = x + self.c@(x)
        """,
    "multinomial": """
        body: x = x * (1 + torch.multinomial(torch.ones(4), 1))
        """,
    "own_generator": """
        body: g@ = torch.Generator().manual_seed(3)
        body: x = x + torch.rand(1, 4, 1, 1, generator=g@)
        """,
    "manual_seed": """
        body: torch.manual_seed(7)
        body: x = x + torch.rand(1, 4, 1, 1)
        """,
    # writes
    "data_written": """
        init: self.src@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.dst@ = nn.Conv2d(4, 4, 3, padding=1)
        body: if not self.training:
        body:     self.dst@.weight.data = self.src@.weight.data * 2
        body:     self.dst@.bias.data = self.src@.bias.data + 1
        body: x = self.dst@(x)
        """,
    "data_copied": """
        init: self.src@ = nn.Conv2d(4, 4, 1)
        init: self.dst@ = nn.Conv2d(4, 4, 1)
        body: with torch.no_grad():
        body:     self.dst@.weight.copy_(self.src@.weight * 0.5)
        body: x = self.dst@(x)
        """,
    "buffer_counts": """
        init: self.register_buffer("count@", torch.tensor(1.0))
        body: self.count@ += 1
        body: x = x / self.count@
        """,
    "buffer_halves": """
        init: self.register_buffer("scale@", torch.ones(1, 4, 1, 1) * 2)
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        body: self.scale@.mul_(0.5)
        body: x = self.c@(x) * self.scale@
        """,
    "buffer_replaced": """
        init: self.register_buffer("last@", torch.zeros(1))
        body: x = x + self.last@
        body: self.last@ = x.detach().mean().reshape(1)
        """,
    "buffer_average": """
        init: self.register_buffer("ema@", torch.zeros(4))
        body: self.ema@.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        body: x = x - self.ema@.view(1, 4, 1, 1)
        """,
    "counter": """
        init: self.calls@ = 0
        body: self.calls@ += 1
        """,
    "counter_used": """
        init: self.calls@ = 0
        body: self.calls@ += 1
        body: x = x * self.calls@
        """,
    "class_counter": """
        init: type(self).seen@ = 0
        body: type(self).seen@ = type(self).seen@ + 1
        """,
    "feature_on_self": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.d@ = nn.Conv2d(4, 4, 1)
        init: self.feat@ = None
        body: self.feat@ = self.c@(x) + self.d@(x)
        body: x = F.relu(self.feat@)
        """,
    "feature_new_name": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: self.seen@ = self.n@(self.c@(x))
        body: x = self.seen@.relu()
        """,
    "setattr": """
        body: setattr(self, "kept@", x)
        """,
    "features_in_list": """
        init: self.list@ = []
        body: self.list@.append(x)
        """,
    "features_in_dict": """
        init: self.dict@ = {}
        body: self.dict@["x"] = x.detach()
        """,
    "outer_list": """
        body: LOG.append(x)
        """,
    "outer_dict": """
        body: STORE["x@"] = x.mean()
        """,
    "global_counter": """
        top: COUNT@ = [0]
        body: COUNT@[0] += 1
        body: STORE["count@"] = COUNT@[0]
        """,
    "attribute_of_child": """
        init: self.child@ = nn.Conv2d(4, 4, 3, padding=1)
        body: x = self.child@(x)
        body: self.child@.seen = float(x.shape[1])
        """,
    "cache": """
        init: self.cache@ = None
        body: if self.cache@ is not None and self.cache@.shape == x.shape:
        body:     x = x + 0.5 * self.cache@
        body: self.cache@ = x.detach()
        """,
    "lazy_grid": """
        init: self.grid@ = None
        body: if self.grid@ is None or self.grid@.shape[-1] != x.shape[-1]:
        body:     self.grid@ = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
        body: x = x + self.grid@
        """,
    "lazy_flag": """
        init: self.first@ = True
        body: if self.first@:
        body:     self.first@ = False
        body:     x = x * 2
        """,
    "stream_state": """
        init: self.state@ = None
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: y@ = self.n@(self.c@(x))
        body: if self.state@ is not None:
        body:     y@ = y@ + self.state@
        body: self.state@ = y@.mean((0, 2, 3), keepdim=True).detach()
        body: x = y@
        """,
    "dict_of_counts": """
        init: self.stats@ = {"n": 0}
        body: self.stats@["n"] += x.shape[0]
        """,
    # in place
    "add_to_alias": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        body: y@ = self.c@(x)
        body: z@ = y@
        body: y@ += 1
        body: x = z@ * 2
        """,
    "add_branch_to_alias": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.d@ = nn.Conv2d(4, 4, 1)
        body: y@ = self.c@(x)
        body: kept@ = y@
        body: y@ += self.d@(x)
        body: x = y@.relu() + kept@
        """,
    "add_to_view": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        body: y@ = self.c@(x)
        body: v@ = y@[:, :2]
        body: v@ += 1
        body: x = y@
        """,
    "mul_list_item": """
        init: self.c@ = nn.Conv2d(4, 4, 1)
        body: ys@ = [self.c@(x), x]
        body: ys@[0] *= 2
        body: x = ys@[0] + ys@[1]
        """,
    "method_in_place": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: y@ = self.c@(x)
        body: y@.mul_(2.0)
        body: x = self.n@(y@)
        """,
    "relu_in_place_read_twice": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: y@ = self.n@(self.c@(x))
        body: r@ = F.relu_(y@)
        body: x = r@ + y@
        """,
    "input_in_place": """
        body: x = x.clone()
        body: x.clamp_(min=-3)
        """,
    "item_assignment": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        body: y@ = self.c@(x)
        body: y@[:, 0] = 0.5
        body: x = y@
        """,
    "masked_fill": """
        body: x = x.masked_fill(x > 2, 2.0)
        """,
    "out_argument": """
        body: o@ = torch.empty_like(x)
        body: with torch.no_grad():
        body:     torch.add(x.detach(), 1, out=o@)
        body: x = x + o@
        """,
    # tensors made in the forward
    "tensor_made": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        body: x = F.relu(self.c@(x)) * torch.tensor(2.0)
        """,
    "tensor_made_inside": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1))
        """,
    "arange": """
        body: x = x + torch.arange(4, dtype=x.dtype, device=x.device).view(1, 4, 1, 1)
        """,
    "zeros_of_shape": """
        body: x = x + torch.zeros(x.shape, dtype=x.dtype)
        """,
    "ones_like": """
        body: x = x * torch.ones_like(x)
        """,
    "new_tensor": """
        body: x = x * x.new_tensor([0.5, 1.0, 1.5, 2.0]).view(1, -1, 1, 1)
        """,
    "mean_and_std": """
        init: self.mean@ = [0.1, 0.2, 0.3, 0.4]
        body: x = (x - torch.tensor(self.mean@).view(1, 4, 1, 1).to(x)) / 0.25
        """,
    "default_dtype": """
        body: x = x * torch.ones((), dtype=torch.get_default_dtype())
        """,
    # conditions on constants
    "parameter_value": """
        init: self.gate@ = nn.Parameter(torch.tensor(0.7))
        body: if self.gate@ > 0:
        INNER
        body: x = x * self.gate@
        """,
    "parameter_item": """
        init: self.p@ = nn.Parameter(torch.ones(1) * 1.5)
        body: x = x * self.p@.item()
        """,
    "weight_norm_question": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        body: if self.c@.weight.abs().sum() > 1e-3:
        body:     x = self.c@(x)
        """,
    "weight_dtype": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x.to(self.c@.weight.dtype)))
        """,
    "weight_device": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.d@ = nn.Conv2d(4, 4, 1)
        body: x = x.to(self.d@.weight.device)
        body: x = (self.c@(x) + self.d@(x)).relu()
        """,
    "first_parameter_dtype": """
        body: x = x.to(next(self.parameters()).dtype)
        """,
    "bias_is_none": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        body: if self.c@.bias is None:
        body:     x = x + 1
        """,
    "buffer_flag": """
        init: self.register_buffer("on@", torch.tensor(True))
        body: if bool(self.on@):
        INNER
        """,
    "kernel_reads_weight": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x)) + self.c@.weight.sum()
        """,
    "integer_buffer": """
        init: self.register_buffer("n@", torch.tensor(3))
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.b@ = nn.BatchNorm2d(4)
        body: x = self.b@(self.c@(x)) / self.n@
        """,
    # who is called
    "plain_list": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        init: self.layers@ = [self.c@, self.n@]
        body: for layer in self.layers@:
        body:     x = layer(x)
        """,
    "plain_dict": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        init: self.by_name@ = {"conv": self.c@, "norm": self.n@}
        body: x = self.by_name@["norm"](self.by_name@["conv"](x))
        """,
    "plain_tuple": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        init: self.pair@ = (self.c@, self.n@)
        body: conv@, norm@ = self.pair@
        body: x = norm@(conv@(x)).relu()
        """,
    "nested_container": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        init: self.plan@ = [{"f": self.c@, "g": [self.n@]}]
        body: for step in self.plan@:
        body:     x = step["g"][0](step["f"](x))
        """,
    "list_twice_named": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        init: self.alias@ = self.n@
        body: x = self.alias@(self.c@(x))
        """,
    "bound_forward": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        init: self.call@ = self.c@.forward
        body: x = self.n@(self.call@(x))
        """,
    "call_forward": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@.forward(self.c@.forward(x))
        """,
    "partial": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        init: self.step@ = functools.partial(apply_both, self.c@, self.n@)
        body: x = self.step@(x)
        """,
    "closure": """
        init: conv, norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        init: self.c@, self.n@ = conv, norm
        init: self.run@ = lambda x: norm(conv(x))
        body: x = self.run@(x)
        """,
    "loop_children": """
        init: self.g@ = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        body: for child in self.g@.children():
        body:     x = child(x)
        """,
    "loop_items": """
        init: self.g@ = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.BatchNorm2d(4)})
        body: for name, child in self.g@.items():
        body:     x = child(x)
        body:     if name == "a":
        body:         x = x + 0.5
        """,
    "loop_modules_by_type": """
        init: self.g@ = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        body: for child in self.g@:
        body:     x = child(x)
        body:     if isinstance(child, nn.BatchNorm2d):
        body:         x = x * 1.5
        """,
    "index_of_sequence": """
        init: self.g@ = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        body: x = self.g@[2](self.g@[:2](x)) + len(self.g@)
        """,
    "shared_activation": """
        init: self.act@ = nn.ReLU()
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.act@(self.n@(self.c@(self.act@(x))))
        """,
    "class_activation": """
        top: class Unit@(nn.Module):
        top:     act = nn.ReLU()
        top:     def __init__(self):
        top:         super().__init__()
        top:         self.c, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        top:     def forward(self, x):
        top:         return self.act(self.n(self.c(x)))
        init: self.u@, self.w@ = Unit@(), Unit@()
        body: x = self.w@(self.u@(x))
        """,
    "called_twice": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        body: x = self.n@(self.c@(x.relu()))
        """,
    "two_norms_one_conv": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        body: y@ = self.c@(x)
        body: x = self.n@[0](y@) * self.n@[1](y@).sigmoid()
        """,
    "domain_norms": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        init: self.domain@ = 0
        body: x = self.n@[self.domain@](self.c@(x))
        """,
    "attribute_of_norm": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        body: x = x.reshape(-1, self.n@.num_features, *x.shape[2:]) + self.n@.eps
        """,
    "attribute_of_conv": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x)) * self.c@.out_channels / self.c@.kernel_size[0]
        """,
    "attribute_of_block": """
        top: class Flagged@(nn.Module):
        top:     def __init__(self):
        top:         super().__init__()
        top:         self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        top:         self.residual = True
        top:     def forward(self, x):
        top:         return self.a(x) + self.b(x)
        init: self.f@ = Flagged@()
        body: y@ = self.f@(x).relu()
        body: x = y@ + x if self.f@.residual else y@
        """,
    "isinstance_of_layer": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        body: x = x * 2 if isinstance(self.n@, nn.BatchNorm2d) else x
        """,
    "method_of_block": """
        top: class Split@(nn.Module):
        top:     def __init__(self):
        top:         super().__init__()
        top:         self.c, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        top:     def stem(self, x):
        top:         return self.n(self.c(x))
        top:     def forward(self, x):
        top:         return self.stem(x).relu()
        init: self.s@ = Split@()
        body: x = self.s@.stem(x) + self.s@(x)
        """,
    "only_a_method": """
        top: class Helper@(nn.Module):
        top:     def __init__(self):
        top:         super().__init__()
        top:         self.c, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        top:     def encode(self, x):
        top:         return self.n(self.c(x)).relu()
        init: self.h@ = Helper@()
        body: x = self.h@.encode(x)
        """,
    "weight_used_twice": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x)) + F.conv2d(x, self.c@.weight, padding=1)
        """,
    "tied_weights": """
        init: self.c@, self.d@ = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        init: self.d@.weight = self.c@.weight
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x)) + self.d@(x).relu()
        """,
    "hook": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        after: M.n@.register_forward_hook(keep_hook)
        """,
    "hook_that_changes": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        after: M.c@.register_forward_hook(lambda m, a, y: y * 2)
        """,
    "pre_hook": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        after: M.c@.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
        """,
    "layer_forward_replaced": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        after: M.c@.forward = types.MethodType(lambda m, x: m._conv_forward(x, m.weight * 2, m.bias), M.c@)
        """,
    "norm_forward_replaced": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        after: M.n@.forward = lambda x: x + 1
        """,
    # geometry and subclasses
    "dilated_later": """
        init: self.c@ = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        after: M.c@.stride, M.c@.dilation, M.c@.padding = (1, 1), (2, 2), (2, 2)
        """,
    "circular_later": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=2, padding_mode="circular")
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))[:, :, 1:-1, 1:-1]
        after: M.c@.padding = (1, 1)
        """,
    "eps_later": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        after: M.n@.eps = 0.1
        """,
    "scaled_conv": """
        top: class Scaled@(nn.Conv2d):
        top:     def forward(self, x):
        top:         return super().forward(x) * 0.5
        init: self.c@ = Scaled@(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        """,
    "standardised_conv": """
        top: class Standard@(nn.Conv2d):
        top:     def forward(self, x):
        top:         w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        top:         return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)
        init: self.c@ = Standard@(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        """,
    "same_conv": """
        top: class Same@(nn.Conv2d):
        top:     def forward(self, x):
        top:         p = max((math.ceil(x.shape[-1] / self.stride[0]) - 1) * self.stride[0] + 3 - x.shape[-1], 0)
        top:         x = F.pad(x, (p // 2, p - p // 2, p // 2, p - p // 2))
        top:         return F.conv2d(x, self.weight, self.bias, self.stride)
        init: self.c@ = Same@(4, 4, 3)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        """,
    "norm_that_activates": """
        top: class NormAct@(nn.BatchNorm2d):
        top:     def forward(self, x):
        top:         return F.relu(super().forward(x))
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = NormAct@(4)
        body: x = self.n@(self.c@(x))
        """,
    "norm_that_counts": """
        top: class Counting@(nn.BatchNorm2d):
        top:     def forward(self, x):
        top:         self.calls = getattr(self, "calls", 0) + 1
        top:         return super().forward(x)
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = Counting@(4)
        body: x = self.n@(self.c@(x))
        """,
    "plain_subclass": """
        top: class Named@(nn.Conv2d):
        top:     tag = "named"
        init: self.c@ = Named@(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        body: x = x + len(self.c@.tag)
        """,
    "weight_norm": """
        init: self.c@ = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x))
        """,
    "property": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        methods: @property
        methods: def kernel@(self):
        methods:     return self.c@.weight * 0.5
        body: x = self.n@(F.conv2d(x, self.kernel@, self.c@.bias, padding=1))
        """,
    # contexts
    "no_grad": """
        body: with torch.no_grad():
        body:     x = x * 2
        INNER
        """,
    "autocast": """
        body: with torch.autocast("cpu", dtype=torch.bfloat16):
        body:     x = x + (torch.ones(4, 4) @ torch.full((4, 4), 1 / 3)).to(x).mean()
        INNER
        """,
    "autocast_off": """
        body: with torch.autocast("cpu", enabled=False):
        body:     x = x * 1.5
        INNER
        """,
    "enable_grad": """
        body: with torch.enable_grad():
        body:     y@ = (x * 2).sum()
        body:     x = x + (0.5 if y@.grad_fn is not None else 0.25)
        """,
    "inference_of_part": """
        body: with torch.set_grad_enabled(False):
        body:     m@ = x.mean()
        body: x = x - m@
        """,
    "record_function": """
        body: with torch.profiler.record_function("stage@"):
        body:     x = x + 1
        INNER
        """,
    "warnings_context": """
        body: with warnings.catch_warnings():
        body:     warnings.simplefilter("ignore")
        INNER
        """,
    "try_except": """
        body: try:
        body:     x = x * 2
        INNER
        body: except RuntimeError:
        body:     x = x * 0
        """,
    "try_untraceable": """
        body: try:
        body:     x = x + int(x.shape[-1]) * 0.01
        body: except TypeError:
        body:     x = x * 0
        """,
    # code that cannot be traced
    "autograd_function": """
        top: class Twice@(torch.autograd.Function):
        top:     @staticmethod
        top:     def forward(ctx, x):
        top:         return x * 2
        top:     @staticmethod
        top:     def backward(ctx, g):
        top:         return g * 2
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = Twice@.apply(self.n@(self.c@(x)))
        """,
    "numpy_values": """
        body: x = x + float(np.abs(x.detach().numpy()).max())
        """,
    "numpy_round_trip": """
        body: x = x * torch.from_numpy(np.tanh(x.detach().cpu().numpy())).to(x)
        """,
    "value_branch": """
        body: if x.mean() > 0:
        body:     x = x * 2
        """,
    "value_loop": """
        body: for _ in range(int(x.detach().abs().max()) % 3):
        body:     x = x * 0.5
        """,
    "item": """
        body: x = x * (1 + x.max().item())
        """,
    "tolist": """
        body: x = x + sum(x.mean((0, 2, 3)).tolist())
        """,
    "any_nan": """
        body: if torch.isnan(x).any():
        body:     raise FloatingPointError("NaN")
        """,
    "early_return": """
        init: self.depth@ = 1
        body: if self.depth@ == 0:
        body:     return x
        """,
    "helper_with_layer": """
        top: def pad_then@(x, conv):
        top:     pad = int(conv.kernel_size[0]) // 2 + (int(x.shape[-1]) % 2)
        top:     y = conv(F.pad(x, (pad, pad, pad, pad)))
        top:     return y[:, :, : x.shape[2], : x.shape[3]]
        init: self.c@ = nn.Conv2d(4, 4, 3)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(pad_then@(x, self.c@))
        """,
    "script_function": """
        top: @torch.jit.ignore
        top: def scaled@(x):
        top:     return x * float(len(x.shape))
        body: x = scaled@(x)
        """,
    "format_string": """
        body: name@ = f"{x.shape[1]}-{self.training}"
        body: x = x + len(name@)
        """,
    "dictionary_of_values": """
        body: d@ = dict(a=x, b=x.relu())
        body: d@.update(c=d@["a"] + d@["b"])
        body: x = d@.pop("c")
        """,
    "walrus_and_star": """
        body: if (y@ := x.sigmoid()) is not None:
        body:     first@, *rest@ = (y@, x, x)
        body:     x = first@ + sum(rest@)
        """,
    "generator_expression": """
        init: self.g@ = nn.ModuleList(nn.Conv2d(4, 4, k, padding=k // 2) for k in (3, 1))
        body: x = functools.reduce(torch.add, (g(x) for g in self.g@)).relu()
        """,
    "recursion": """
        methods: def again@(self, x, n):
        methods:     return x if n == 0 else self.again@(x.sigmoid(), n - 1)
        body: x = self.again@(x, 3)
        """,
    "checkpointed": """
        init: self.g@ = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        body: if self.training and x.requires_grad:
        body:     x = torch.utils.checkpoint.checkpoint(self.g@, x, use_reentrant=False)
        body: else:
        body:     x = self.g@(x)
        """,
    "child_returns_tuple": """
        top: class Pair@(nn.Module):
        top:     def __init__(self):
        top:         super().__init__()
        top:         self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        top:     def forward(self, x, scale=1.0, *, shift=0.0):
        top:         y = self.b(self.a(x))
        top:         return y * scale + shift, x
        init: self.p@ = Pair@()
        body: y@, z@ = self.p@(x, shift=0.5)
        body: x = y@ + z@
        """,
    "child_returns_dict": """
        top: class Named@(nn.Module):
        top:     def __init__(self):
        top:         super().__init__()
        top:         self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        top:     def forward(self, x):
        top:         return {"out": self.b(self.a(x)), "size": x.shape[-1]}
        init: self.p@ = Named@()
        body: d@ = self.p@(x)
        body: x = d@["out"] + 0.01 * d@["size"]
        """,
    "child_takes_list": """
        top: class Sum@(nn.Module):
        top:     def __init__(self):
        top:         super().__init__()
        top:         self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        top:     def forward(self, xs):
        top:         if isinstance(xs, torch.Tensor):
        top:             xs = [xs]
        top:         return sum(self.a(x) + self.b(x) for x in xs)
        init: self.p@ = Sum@()
        body: x = self.p@([x, x.relu()]) + self.p@(x)
        """,
    "child_with_option": """
        top: class Optional@(nn.Module):
        top:     def __init__(self):
        top:         super().__init__()
        top:         self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        top:     def forward(self, x, flip=False):
        top:         y = self.a(x) - self.b(x) if flip else self.a(x) + self.b(x)
        top:         return y.relu()
        init: self.p@ = Optional@()
        body: x = self.p@(x) - self.p@(x, flip=True)
        """,
    # reflection
    "scripting_question": """
        body: if not torch.jit.is_scripting() and not torch.jit.is_tracing():
        INNER
        """,
    "tracing_question": """
        body: if torch.jit.is_tracing() or torch.fx._symbolic_trace.is_fx_tracing():
        body:     x = x * 0
        """,
    "proxy_question": """
        body: x = x * 0 if isinstance(x, torch.fx.Proxy) else x + 1
        """,
    "torch_assert": """
        body: torch._assert(x.shape[1] == 4, "four channels")
        """,
    "get_submodule": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.get_submodule("n@")(self._modules["c@"](x))
        """,
    "getattr_by_name": """
        init: self.g@a, self.g@b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        body: for letter in "ab":
        body:     x = getattr(self, f"g@{letter}")(x)
        """,
    "all_parameters": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x)) + 0.01 * sum(p.sum() for p in self.parameters())
        """,
    "count_modules": """
        body: x = x + 0.1 * len(list(self.modules()))
        """,
    "named_parameters": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x)) * dict(self.named_parameters())["n@.weight"].mean()
        """,
    "state_dict_read": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(self.c@(x)) + self.state_dict()["n@.running_mean"].sum()
        """,
    "functional_call": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: w@ = {k: v * 2 for k, v in self.c@.named_parameters()}
        body: x = self.n@(torch.func.functional_call(self.c@, w@, (x,)))
        """,
    "class_forward": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = nn.Module.__call__(self.n@, type(self.c@).forward(self.c@, x))
        """,
    "deepcopy_in_forward": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(copy.deepcopy(self.c@)(x))
        """,
    "getattr_override": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        methods: def __getattr__(self, name):
        methods:     return super().__getattr__(name.removeprefix("the_"))
        body: x = self.the_n@(self.the_c@(x))
        """,
    "class_constant": """
        methods: SCALE@ = 1.5
        body: x = x * self.SCALE@
        """,
    "environment": """
        body: x = x * 2 if os.environ.get("NO_SUCH_SETTING") is None else x
        """,
    "lru_cache": """
        top: @functools.lru_cache(maxsize=None)
        top: def window@(size):
        top:     return torch.hann_window(size, dtype=torch.float64)
        body: x = x * (1 + window@(x.shape[-1]))
        """,
    "global_flag": """
        top: SWITCH@ = {"on": True}
        body: if SWITCH@["on"]:
        INNER
        """,
    "match_statement": """
        body: match x.ndim:
        body:     case 4:
        body:         x = x + 1
        body:     case _:
        body:         x = x - 1
        """,
    "context_of_own": """
        top: @contextlib.contextmanager
        top: def staged@(name):
        top:     STORE["stage"] = name
        top:     yield
        top:     STORE["stage"] = "out"
        body: with staged@("in"):
        body:     x = x * 2
        INNER
        """,
    "try_finally": """
        init: self.depth@ = 0
        body: self.depth@ += 1
        body: try:
        body:     x = x + self.depth@
        INNER
        body: finally:
        body:     self.depth@ -= 1
        """,
    "generator_function": """
        top: def parts@(x):
        top:     for k in range(4):
        top:         yield x[:, k : k + 1] * (k + 1)
        body: x = torch.cat(list(parts@(x)), 1)
        """,
    "gradient_in_forward": """
        body: with torch.enable_grad():
        body:     z@ = x.detach().requires_grad_()
        body:     g@, = torch.autograd.grad(z@.square().sum(), z@)
        body: x = x + g@
        """,
    "vmap": """
        body: x = torch.vmap(lambda s: s * 2)(x)
        """,
    "warn": """
        body: warnings.warn("seen", stacklevel=2)
        """,
    "logging": """
        body: logging.getLogger("net").debug("shape %s", x.shape)
        """,
    "deleted_name": """
        init: self.c@, self.d@ = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        body: y@ = self.c@(x)
        body: x = y@ + self.d@(x)
        body: del y@
        """,
    # more of shapes and values
    "product_of_shape": """
        body: x = x * (math.prod(x.shape[2:]) ** -0.5)
        """,
    "numpy_of_shape": """
        body: x = x / np.sqrt(x.shape[1])
        """,
    "numel_of_size": """
        body: x = x + 1e-3 * x.shape[2:].numel()
        """,
    "size_equals": """
        body: if x.shape[-2:] == torch.Size([9, 11]):
        body:     x = x + 1
        """,
    "size_remembered": """
        init: self.size@ = None
        body: if self.size@ != x.shape:
        body:     self.size@ = x.shape
        body:     x = x + 1
        """,
    "min_of_sizes": """
        body: x = x * min(x.shape[2], x.shape[3], 10)
        """,
    "ceil_of_size": """
        body: x = x + math.ceil(x.shape[2] / 2)
        """,
    "patches": """
        body: x = torch.cat([x[:, :, k : k + 4] * (k + 1) for k in range(0, x.shape[2], 4)], 2)
        """,
    "size_as_string": """
        body: x = x + len(str(tuple(x.shape)))
        """,
    "pad_to_multiple": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: h@, w@ = x.shape[2:]
        body: if h@ % 4 or w@ % 4:
        body:     x = F.pad(x, (0, -w@ % 4, 0, -h@ % 4))
        body: x = self.n@(self.c@(x))[:, :, :h@, :w@]
        """,
    "any_positive": """
        body: x = x * 2 if bool((x > 0).any()) else x
        """,
    "boolean_index": """
        body: x = x.clone()
        body: x[x > 1] = 1.0
        """,
    "nonzero_loop": """
        body: for row in (x.mean((1, 2, 3)) > 0).nonzero():
        body:     x = x + float(row)
        """,
    "where": """
        body: x = torch.where(x > 0, x, 0.1 * x)
        """,
    "fft": """
        body: x = torch.fft.fft2(x).abs()
        """,
    "einsum": """
        init: self.mix@ = nn.Parameter(torch.randn(4, 4))
        body: x = torch.einsum("bchw,dc->bdhw", x, self.mix@)
        """,
    "keyword_conv": """
        init: self.w@ = nn.Parameter(torch.randn(4, 4, 3, 3))
        init: self.n@ = nn.BatchNorm2d(4)
        body: x = self.n@(F.conv2d(input=x, weight=self.w@, padding=1))
        """,
    "sorted_channels": """
        body: x = x.gather(1, x.mean((2, 3), keepdim=True).argsort(1).expand_as(x))
        """,
    "batch_moved": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4)
        body: b@ = x.shape[0]
        body: y@ = self.c@(torch.cat([x, -x]))
        body: x = self.n@(y@)[b@:]
        """,
    "tokens": """
        init: self.fc@ = nn.Linear(4, 4)
        init: self.n@ = nn.BatchNorm1d(4)
        body: t@ = x.flatten(2).transpose(1, 2)
        body: t@ = self.n@(self.fc@(t@).transpose(1, 2))
        body: x = x + t@.reshape(x.shape)
        """,
    "frozen_norm": """
        top: class Frozen@(nn.Module):
        top:     def __init__(self):
        top:         super().__init__()
        top:         for name, value in (("weight", 1.5), ("bias", 0.5), ("running_mean", 0.1), ("running_var", 1.2)):
        top:             self.register_buffer(name, torch.full((4,), value))
        top:     def forward(self, x):
        top:         scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        top:         return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = Frozen@()
        body: x = self.n@(self.c@(x))
        """,
    "plain_norm": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.BatchNorm2d(4, affine=False, momentum=None)
        body: x = self.n@(self.c@(x))
        """,
    "other_norms": """
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        init: self.n@ = nn.Sequential(nn.InstanceNorm2d(4), nn.GroupNorm(2, 4))
        body: x = self.n@(self.c@(x))
        """,
    "kernel_made_in_eval": """
        init: self.c@, self.d@ = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        init: self.fused@ = None
        body: if self.training:
        body:     self.fused@ = None
        body:     x = self.c@(x) + self.d@(x)
        body: else:
        body:     if self.fused@ is None:
        body:         self.fused@ = (self.c@.weight + F.pad(self.d@.weight, (1, 1, 1, 1))).detach()
        body:     x = F.conv2d(x, self.fused@, self.c@.bias + self.d@.bias, padding=1)
        """,
    "switch_to_deploy": """
        top: class Deploying@(nn.Module):
        top:     def __init__(self):
        top:         super().__init__()
        top:         self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        top:     def forward(self, x):
        top:         if hasattr(self, "fused"):
        top:             return self.fused(x)
        top:         return F.relu(self.a(x) + self.b(x))
        init: self.s@ = Deploying@()
        body: x = self.s@(x)
        """,
    "optional_child": """
        init: self.skip@ = None
        init: self.c@ = nn.Conv2d(4, 4, 3, padding=1)
        body: y@ = x if self.skip@ is None else self.skip@(x)
        body: x = self.c@(x) + y@
        """,
    "repeated_blocks": """
        top: class Rep@(nn.Module):
        top:     def __init__(self):
        top:         super().__init__()
        top:         self.a = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        top:         self.b = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        top:         self.drop = nn.Dropout2d(0.1)
        top:     def forward(self, x, *, keep=None):
        top:         y = self.a(x) + self.b(x) + x
        top:         if keep is not None:
        top:             keep.append(y)
        top:         return F.relu(self.drop(y))
        init: self.r@ = nn.ModuleList(Rep@() for _ in range(2))
        body: kept@ = []
        body: for layer in self.r@:
        body:     x = layer(x, keep=kept@)
        body: x = x + sum(kept@)
        """,
    "child_counts": """
        top: class Step@(nn.Module):
        top:     def __init__(self):
        top:         super().__init__()
        top:         self.a, self.b, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), 0
        top:     def forward(self, x):
        top:         self.n += 1
        top:         return (self.a(x) + self.b(x)) * self.n
        init: self.p@ = Step@()
        body: x = self.p@(x)
        """,
}
"""Ordinary Python of a forward; with ``INNER``, around other snippets."""

STYLES: dict[str, str] = {
    "plain": """
        def forward(self, SIGNATURE):
            BODY
        """,
    "through_a_method": """
        def forward(self, SIGNATURE):
            return self._forward(PASSED)

        def _forward(self, SIGNATURE):
            BODY
        """,
    "on_the_instance": """
        def forward(self, SIGNATURE):
            raise NotImplementedError
        """,
    "inherited": """
        """,
    "overridden": """
        def forward(self, SIGNATURE):
            BODY
        """,
    "decorated": """
        @transparent
        def forward(self, SIGNATURE):
            BODY
        """,
    "no_grad_decorator": """
        @torch.no_grad()
        def forward(self, SIGNATURE):
            BODY
        """,
    "wrapped": """
        def forward(self, SIGNATURE):
            BODY
        """,
    "called_by_class": """
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

        def forward(self, SIGNATURE):
            BODY
        """,
}
"""How the class comes to its forward."""


@dataclass(frozen=True)
class Arguments:
    """A signature: what is passed on by name, statements that make ``x``, and calls as expressions of ``x`` and ``y``.

    Calls under ``optional`` give an argument another value than its default: they may be refused.
    """

    signature: str = "x"
    passed: str = "x"
    before: str = ""
    calls: tuple[str, ...] = ("x",)
    optional: tuple[str, ...] = ()
    after: str = ""


ARGUMENTS: dict[str, Arguments] = {
    "one": Arguments(calls=("x", "x=x")),
    "optional_tensor": Arguments(
        "x, mask=None",
        "x, mask",
        after="if mask is not None:\n    x = x * mask",
        calls=("x", "x, None", "x, mask=None"),
        optional=("x, y", "x, mask=y"),
    ),
    "flag": Arguments(
        "x, flip=False",
        "x, flip",
        before="if flip:\n    x = x.flip(-1)",
        calls=("x", "x, flip=False", "x, False"),
        optional=("x, flip=True", "x, True"),
    ),
    "keyword_only": Arguments(
        "x, *, mode='a'",
        "x, mode=mode",
        before="if mode == 'b':\n    x = -x",
        calls=("x", "x, mode='a'"),
        optional=("x, mode='b'",),
    ),
    "number": Arguments(
        "x, factor=2.0",
        "x, factor",
        before="x = x * factor",
        calls=("x", "x, 2.0"),
        optional=("x, 3.0", "x, factor=0.5"),
    ),
    "two_tensors": Arguments(
        "x, other", "x, other", before="x = x + other", calls=("x, y", "x, other=y", "other=x, x=y")
    ),
    "var_positional": Arguments("*args", "*args", before="x = args[0]", calls=("x",)),
    "var_all": Arguments(
        "*args, **kwargs",
        "*args, **kwargs",
        before="x = args[0] if args else kwargs['x']",
        calls=("x",),
        optional=("x=x",),
    ),
    "keywords": Arguments(
        "x, **kwargs", "x, **kwargs", before="x = x * kwargs.get('factor', 1)", calls=("x",), optional=("x, factor=2",)
    ),
    "dict_input": Arguments("batch", "batch", before="x = batch['x']", calls=("{'x': x}", "batch={'x': x, 'id': 3}")),
    "list_input": Arguments("xs", "xs", before="x = xs[0] + xs[1]", calls=("[x, y]", "(x, y)")),
    "list_or_tensor": Arguments(
        "x", "x", before="if isinstance(x, (list, tuple)):\n    x = x[0] + x[1]", calls=("x",), optional=("[x, y]",)
    ),
    "features_too": Arguments(
        "x, features=False",
        "x, features",
        after="if features:\n    return x, x.mean((2, 3))",
        calls=("x", "x, features=False"),
        optional=("x, features=True",),
    ),
    "none_default": Arguments(
        "x=None", "x", before="if x is None:\n    raise TypeError('x is needed')", calls=("x", "x=x")
    ),
}
"""What the network takes."""

RETURNS: dict[str, str] = {
    "tensor": "x",
    "tuple": "x, x.mean((2, 3))",
    "list": "[x, x.relu()]",
    "dict": "{'out': x, 'pooled': x.mean((2, 3))}",
    "ordered_dict": "OrderedDict(out=x)",
    "dataclass": "Answer(x, x.shape[-1])",
    "named_tuple": "Both(x, x.sigmoid())",
    "dict_subclass": "Output(logits=x)",
    "with_none": "x, None",
    "nested": "{'a': [x, (x.relu(), {'b': x.sum()})]}",
    "with_size": "x, x.shape",
    "with_int": "{'out': x, 'height': x.shape[2], 'name': 'net'}",
    "own_class": "Holder(x)",
    "same_twice": "x, x",
    "input_too": "x, given",
    "generator": "[v for v in (x, x.neg())]",
}
"""What the network returns; ``given`` is the value that the forward began with."""

PREAMBLE = '''
import contextlib, copy, dataclasses, functools, logging, math, os, random, types, warnings
from collections import OrderedDict, namedtuple

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

LOG, STORE = [], {}
Both = namedtuple("Both", "first second")


@dataclasses.dataclass
class Answer:
    out: Tensor
    size: int


class Output(OrderedDict):
    """As a library's ModelOutput: items and attributes."""

    def __init__(self, **values):
        super().__init__(values)
        self.__dict__.update(values)


class Holder:
    def __init__(self, value):
        self.value = value


class Wrapper(nn.Module):
    """As AveragedModel or DataParallel on a CPU."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def apply_both(conv, norm, x):
    return norm(conv(x))


def keep_hook(module, args, out):
    STORE["hook"] = out.sum()


def transparent(f):
    @functools.wraps(f)
    def inner(*args, **kwargs):
        return f(*args, **kwargs)

    return inner
'''
