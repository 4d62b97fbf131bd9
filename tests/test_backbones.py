"Exits on any CNN: stages are the backbone, the classifier stays, every parameter learns; or it is refused."

import pytest
from conftest import *
from fastai.vision.models import xresnet
from eed_fastai.trace import *
from eed_fastai.stages import *
from eed_fastai.exits import KeptHead, default_head
from eed_fastai.costs import plot_costs

torchvision_names = '''
    alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 squeezenet1_1 densenet121
    shufflenet_v2_x1_0 mobilenet_v2 mobilenet_v3_small mnasnet1_0 efficientnet_b0 efficientnet_v2_s
    regnet_x_400mf regnet_y_400mf convnext_tiny
'''.split()
timm_names = '''
    resnet18 resnet26d resnetv2_50 efficientnet_b0 mobilenetv3_small_100 mobilenetv4_conv_small convnext_tiny
    convnextv2_atto regnetx_002 regnety_002 densenet121 vgg11_bn repvgg_a0
'''.split()
slow = {
    'wide_resnet50_2',
    'resnext50_32x4d',
    'efficientnet_v2_s',
    'convnext_tiny',
    'vgg11_bn',
    'timm-convnext_tiny',
    'timm-resnetv2_50',
    'timm-vgg11_bn',
    'timm-densenet121',
}


def timm_net(name, **kw):
    return pytest.importorskip('timm', reason="timm is an extra: pip install 'eed_fastai[timm]'").create_model(
        name, **kw
    )


zoo = {
    **{n: getattr(models, n) for n in torchvision_names},
    'googlenet': partial(models.googlenet, init_weights=False, aux_logits=False),
    **{f'timm-{n}': partial(timm_net, n) for n in timm_names},
    'xresnet18': xresnet.xresnet18,
    'xresnet50': xresnet.xresnet50,
    'cifar_resnet18': tiny_resnet,
}
every_net = pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in zoo])
n_stages = dict(alexnet=2, squeezenet1_1=3, shufflenet_v2_x1_0=3, googlenet=3, mobilenet_v2=5, efficientnet_b0=5) | {
    'timm-efficientnet_b0': 5
}


def an_image(name, n=2):
    return torch.randn(n, 3, 160, 128) if name == 'alexnet' else torch.randn(n, 3, 96, 75)  # odd sizes


def caught(m, net, x):
    "What `m` gives while `net` runs"
    got = []
    hook = m.register_forward_hook(lambda _, a, out: got.append(out.clone()))
    z = net(x)
    hook.remove()
    return got[-1] if got else None, z


@every_net
def test_a_backbone_keeps_its_answers(name):
    net = zoo[name]().eval()
    x = an_image(name)
    model = multi_exit(net).eval()
    assert (
        model.n_exits == n_stages.get(name, 4)
        and isinstance(model.heads[-1], KeptHead)
        and not any(o.training for o in net.modules())
    )
    with torch.no_grad():
        theirs, z = caught(net.features if name == 'densenet121' else model.stages[-1][-1], net, x)
        assert torch.equal(
            nn.Sequential(*model.stages)(x), theirs.relu() if name == 'densenet121' else theirs
        )  # to the last bit; densenet's last ReLU is none of its modules
        assert torch.allclose(model(x), z, rtol=1e-4, atol=1e-5)
        both = model.all_exits(x)
        assert both.logits.shape == (2, model.n_exits, z.shape[1]) and torch.allclose(
            both.logits[:, -1], z, rtol=1e-4, atol=1e-5
        )
        again = deepcopy(model)
        assert torch.equal(again.all_exits(x).logits, both.logits)
        for p in again.parameters():
            p.zero_()
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), model(x))
        last_format = again.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
        assert torch.allclose(last_format, z, rtol=1e-3, atol=1e-4)


@every_net
def test_a_backbone_trains_as_before(name):
    net = zoo[name]()
    copy = deepcopy(net)
    model = multi_exit(net)
    x = an_image(name, 4)
    torch.manual_seed(0)
    copy(x)
    torch.manual_seed(0)
    z = model.all_exits(x).logits
    ours, theirs = (
        [
            v
            for o in m.modules()
            if isinstance(o, nn.modules.batchnorm._BatchNorm)
            for v in (o.running_mean, o.running_var)
        ]
        for m in (net, copy)
    )
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))  # the same running statistics, bit by bit
    z.square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert {id(p) for p in net.parameters()} <= {id(p) for p in model.parameters()}  # nothing of the network was lost


@pytest.mark.parametrize('n_in', [1, 3, 4])
@every_net
def test_other_channels(name, n_in):
    arch = zoo[name] if not name.startswith('timm-') else name[5:]
    if name == 'googlenet':
        arch = partial(models.googlenet, init_weights=False, aux_logits=False, transform_input=False)
    if isinstance(arch, str):
        pytest.importorskip('timm')
    model = multi_exit(arch, n_out=5, n_in=n_in)
    assert model.n_in == n_in and model(torch.randn(2, n_in, *[160 if name == 'alexnet' else 64] * 2)).shape == (2, 5)


def test_cutting_moves_no_statistics():
    net = resnet18()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    multi_exit(net)
    assert (
        all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        and net.training
        and not any(o._forward_hooks or o._forward_pre_hooks for o in net.modules())
    )


refused = dict(
    googlenet=(partial(models.googlenet, init_weights=False), 'auxiliary'),
    inception=(partial(models.inception_v3, init_weights=False), 'auxiliary'),
    transform=(
        partial(models.googlenet, init_weights=False, aux_logits=False, transform_input=True),
        'from its input to conv1',
    ),
    swin=(models.swin_t, 'not square'),
    vit=(partial(models.VisionTransformer, 224, 56, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8), 'no module'),
    timm_vit=(partial(timm_net, 'vit_tiny_patch16_224'), 'no map comes out'),
)


@pytest.mark.parametrize('make,why', refused.values(), ids=refused)
def test_what_cannot_be_cut_is_refused(make, why):
    net = make()
    hooks = [len(o._forward_hooks) for o in net.modules()]
    for arch in (net, make):
        with pytest.raises(ValueError, match=f'cannot be cut into stages.*{why}.*`(cuts=|aux_logits)'):
            multi_exit(arch, **({} if arch is net else dict(n_out=5)))
    assert [len(o._forward_hooks) for o in net.modules()] == hooks


class LeNet(nn.Module):
    "As beginners write it"

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.fc1, self.fc2 = (
            nn.Conv2d(3, 6, 5),
            nn.Conv2d(6, 16, 5),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Linear(16 * 5 * 5, 20),
            nn.Linear(20, 7),
        )

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(F.relu(self.conv3(x)), 1))))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(resnet18().children())[:-2]

    def forward(self, x):
        for o in self.parts:
            x = o(x)
        return x


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.encoder = nn.Linear(512, 7), Encoder()

    def forward(self, x):
        return self.fc(F.dropout(self.encoder(x).mean((2, 3)), 0.3, self.training))


@pytest.mark.parametrize('make,size,n', [(LeNet, 32, 2), (Opaque, 64, 4)])
def test_networks_of_ones_own(make, size, n):
    net = make().eval()
    model = multi_exit(net).eval()
    x = torch.randn(2, 3, size, size)
    assert model.n_exits == n and model.size == size
    with torch.no_grad():
        assert torch.allclose(model(x), net(x), rtol=1e-4, atol=1e-5)
    if make is Opaque:
        assert [round(o.p, 3) for o in model.heads[-1].body if isinstance(o, nn.Dropout)] == [
            0.3
        ]  # a function in `forward`, put back as a module


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = tiny_resnet()

    def forward(self, x):
        for m in self.net[:3]:
            x = m(x)
        return self.net[3:](x.sin())


def test_a_function_that_is_unknown_is_named():
    with pytest.raises(
        ValueError, match='from net.layer1.1 to net.layer2.0, its `forward` does something for which it has no module'
    ):
        multi_exit(Odd())


def conv(ni, nf, stride=1):
    return nn.Sequential(nn.Conv2d(ni, nf, 3, stride, 1, bias=False), nn.BatchNorm2d(nf), nn.ReLU())


class Base(nn.Module):
    "A plain network, for variations on it"

    def __init__(self):
        super().__init__()
        self.l0, self.l1, self.l2, self.l3 = [
            nn.Sequential(conv(i, o, s), conv(o, o)) for i, o, s in ((3, 8, 1), (8, 16, 2), (16, 32, 2), (32, 64, 2))
        ]
        self.fc = nn.Linear(64, 5)
        self.more()

    def more(self):
        pass

    def body(self, x):
        return self.l3(self.l2(self.l1(self.l0(x))))

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class TopSE(Base):
    "A branch across two stages, by functions, with a pooling before maps go on"

    def more(self):
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1)

    def forward(self, x):
        x = self.l2(self.l1(self.l0(x)))
        return self.fc(self.l3(x * self.gate(self.pool(x)).sigmoid()).mean((2, 3)))


class Noise(Base):
    def forward(self, x):
        x = self.body(x)
        return self.fc((x + torch.randn_like(x) if self.training else x).mean((2, 3)))


class Skips(Base):
    "Leaves a part out in training"

    def more(self):
        self.extra = conv(32, 32)

    def body(self, x):
        x = self.l2(self.l1(self.l0(x)))
        return self.l3(x if self.training else self.extra(x))


class Kwargs(Base):
    def forward(self, x):
        return self.fc(self.l3(self.l2(self.l1(input=self.l0(input=x)))).mean((2, 3)))


@pytest.mark.parametrize('make', [TopSE, Noise, Skips])
def test_nothing_is_lost_in_silence(make):
    for arch in (make, make()):
        with pytest.raises(ValueError, match='cannot be (cut|kept)'):
            multi_exit(arch, n_out=5)


class Dropped(Base):
    def forward(self, x):
        return self.fc(
            F.dropout(
                self.l3(F.dropout2d(self.l2(self.l1(self.l0(x))), 0.25, self.training)).mean((2, 3)), 0.5, self.training
            )
        )


def test_dropout_by_a_function_is_put_back():
    net = Dropped()
    model = multi_exit(net)
    found = [(type(m).__name__, round(m.p, 2)) for m in model.modules() if 'Dropout' in type(m).__name__]
    assert found == [('Dropout2d', 0.25), ('Dropout', 0.5)]
    x = torch.randn(64, 3, 32, 32)
    a, b = (torch.stack([m(x) for _ in range(30)]).var(0).mean() for m in (net, model))
    assert 0.7 < a / b < 1.4  # as noisy as before
    assert not multi_exit(net).eval().training and torch.allclose(
        multi_exit(net).eval()(x), net.eval()(x), rtol=1e-4, atol=1e-5
    )


class ReLU6Net(Base):
    def body(self, x):
        for l in (self.l0, self.l1, self.l2, self.l3):
            x = F.relu6(l[1][0](F.relu6(l[0][0](x))))
        return x


class CeilNet(Base):
    def body(self, x):
        return self.l3(F.max_pool2d(self.l2(F.max_pool2d(self.l1(self.l0(x)), 2, ceil_mode=True)), 2, ceil_mode=True))


class MaxNet(Base):
    def forward(self, x):
        return self.fc(self.body(x).amax((2, 3)))


class LeakyNet(Base):
    def forward(self, x):
        return self.fc(F.leaky_relu(self.l3(F.max_pool2d(self.l2(self.l1(self.l0(x))), 3, 2, 1)), 0.1).mean((2, 3)))


@pytest.mark.parametrize('make', [ReLU6Net, CeilNet, MaxNet, LeakyNet, Kwargs])
@pytest.mark.parametrize('size', [64, 70])
def test_functions_are_told_apart(make, size):
    net = make().eval()
    model = multi_exit(net).eval()
    for scale in (1, 30):
        x = scale * torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert torch.allclose(model(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_convolution_as_classifier_stays():
    class Wrap(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

    nin = nn.Sequential(
        conv(3, 8),
        conv(8, 8),
        conv(8, 16, 2),
        conv(16, 32, 2),
        conv(32, 64, 2),
        nn.Conv2d(64, 10, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for net, n in ((nin, 10), (Wrap(models.squeezenet1_1(num_classes=7)), 7)):
        model = multi_exit(net.eval()).eval()
        x = torch.randn(2, 3, 96, 96)
        with torch.no_grad():
            assert model.n_out == n and torch.allclose(model(x), net(x), rtol=1e-4, atol=1e-5)


class SameNames(Base):
    def more(self):
        self.drop, self.drop_1, self.mid = nn.Dropout(0.2), nn.Dropout(0.5), nn.Linear(64, 64)

    def forward(self, x):
        return self.fc(self.drop_1(self.drop(self.mid(self.drop(self.body(x).mean((2, 3)))))))


def test_parts_whose_names_would_clash():
    assert [m.p for m in multi_exit(SameNames()).heads[-1].body if isinstance(m, nn.Dropout)] == [0.2, 0.2, 0.5]


class Shared(Base):
    def more(self):
        self.l2, self.l3, self.shared = conv(16, 16, 2), conv(16, 64, 2), conv(16, 16)

    def forward(self, x):
        return self.fc(self.l3(self.shared(self.l2(self.shared(self.l1(self.l0(x)))))).mean((2, 3)))


def test_a_module_in_two_stages_is_trained_once():
    from eed_fastai.model import exit_splitter

    model = multi_exit(Shared())
    ids = [id(p) for g in exit_splitter(model) for p in g]
    assert len(ids) == len(set(ids)) == len(list(model.parameters()))


def test_modes_stay():
    net = Base()
    net.l1.eval()
    before = {m: m.training for m in net.modules()}
    multi_exit(net)
    assert all(m.training == t for m, t in before.items())
    vgg = models.vgg11_bn().eval()
    with pytest.raises(ValueError, match='returns a pair'):
        multi_exit(
            vgg,
            head=lambda ni, widths, n_out: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(ni, n_out)),
        )
    assert not any(m.training for m in vgg.modules())


@pytest.mark.parametrize('kw', [dict(n_exits=3), dict(n_exits=2), dict(cuts=['layer2'])])
def test_an_exit_costs_the_same_whoever_else_is_there(kw):
    every = exit_costs(multi_exit(resnet18, n_out=10), 224).set_index('params').macs
    some = exit_costs(multi_exit(resnet18, n_out=10, **kw), 224)
    assert [every[p] for p in some.params] == some.macs.tolist()


class InPlace(nn.Module):
    def __init__(self, ni, nf):
        super().__init__()
        self.drop, self.convs = (
            nn.Dropout2d(0.3, inplace=True),
            nn.Sequential(nn.Conv2d(ni, nf, 3, 2, 1), nn.ReLU(), nn.Conv2d(nf, nf, 3, 1, 1)),
        )

    def forward(self, x):
        return self.convs(self.drop(x))


def test_a_dropout_in_place_at_the_start_of_a_stage():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1),
        nn.BatchNorm2d(8),
        InPlace(8, 16),
        InPlace(16, 32),
        InPlace(32, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    multi_exit(net).all_exits(torch.randn(4, 3, 64, 64)).logits.sum().backward()


def test_fastais_timm_networks():
    "They hold weights that never run"
    from fastai.vision.learner import create_timm_model

    pytest.importorskip('timm')
    for name in ('mobilenetv3_small_100', 'convnextv2_atto'):
        net = create_timm_model(name, 10, pretrained=False)[0].eval()
        model = multi_exit(net).eval()
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.allclose(model(x), net(x), rtol=1e-4, atol=1e-5)


def test_unpadded_convolutions_are_one_stage_until_half_is_gone():
    net = nn.Sequential(
        *[m for i, o in ((3, 8), *[(8, 8)] * 9) for m in (nn.Conv2d(i, o, 5), nn.ReLU())],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    assert len(split_stages(net)) <= 3


def test_a_group_that_shrinks_twice_is_one_cut():
    group = nn.Sequential(nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.MaxPool2d(2))
    net = nn.Sequential(
        conv(3, 8), conv(8, 8), group, conv(8, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )
    assert [len(o) > 0 for o in split_stages(net)] == [True, True]


def test_statistics_of_norms_without_weights_stay():
    class Loose(Base):
        def more(self):
            self.l1 = nn.Sequential(self.l1, nn.BatchNorm2d(16, affine=False))

    learn = make_learner(dls=small_digits(), model=Loose().float())
    learn.model.fc = nn.Linear(64, 10)
    learn.to_eed()
    norm = next(m for m in learn.model.stages.modules() if isinstance(m, nn.BatchNorm2d) and not m.affine)
    before = norm.running_mean.clone()
    learn.freeze()
    with learn.no_logging():
        learn.fit(1)
    assert torch.equal(norm.running_mean, before)
    learn.unfreeze()
    with learn.no_logging():
        learn.fit(1)
    assert not torch.equal(norm.running_mean, before)


def test_plain_networks_have_no_exits():
    from eed_fastai.model import exit_splitter

    for f in (partial(exit_costs, size=64), partial(part_macs, size=64), exit_splitter):
        with pytest.raises(TypeError, match='has no exits; put some on it with `multi_exit`'):
            f(resnet18())


class Centred(Base):
    def more(self):
        self.mean = torch.zeros(1, 8, 1, 1)
        self.l1.register_forward_pre_hook(lambda m, a: (a[0] - self.mean,))


def test_costs_of_what_has_no_copy_without_numbers():
    a, b = (exit_costs(multi_exit(o, n_out=5), 64) for o in (Centred, Base))
    assert a.macs.tolist() == b.macs.tolist()


@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.compile], ids=['DataParallel', 'compile'])
def test_a_wrapped_network_is_taken_out(wrap):
    net = Base()
    assert multi_exit(wrap(net)).stages[0][0] is net.l0[0][0]


def test_a_stage_that_begins_in_place():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    model = multi_exit(net, cuts=['4'])
    assert isinstance(model.stages[1][0], Copied)
    z = model.all_exits(torch.randn(4, 3, 32, 32)).logits
    z.sum().backward()  # without the copy: 'modified by an inplace operation'


def test_cuts_inside_a_closed_stage():
    net = timm_net('convnextv2_atto')
    model = multi_exit(net, cuts=['stages.1', 'stages.2.blocks.3', 'stages.3'])
    x = torch.randn(2, 3, 64, 64)
    with evaluating(model), evaluating(net):
        assert torch.allclose(model(x), net(x), rtol=1e-4, atol=1e-5)
    assert model.n_exits == 4 and model.shapes[1][1] == model.shapes[2][1]
    with pytest.raises(ValueError, match="'stages.7', at which no stage can begin; the parts after the first are"):
        multi_exit(net, cuts=['stages.7'])


def test_fewer_exits_at_equal_shares():
    model = multi_exit(resnet18, n_out=5, n_exits=3)
    assert [s[0] for s in model.shapes] == [64, 256, 512] and model.made['n_exits'] == 3
    macs = np.array(stage_macs(split_stages(resnet18())))
    ends = spread_exits(split_stages(resnet18()), 3)
    share = macs.cumsum() / macs.sum()
    import itertools

    best = min(
        itertools.combinations(range(3), 2), key=lambda c: sum((share[i] - w) ** 2 for i, w in zip(c, (1 / 3, 2 / 3)))
    )
    assert tuple(ends[:-1]) == best
    planned = multi_exit(partial(cifar_vgg19, width=8), n_out=5, n_exits=2)
    full = multi_exit(partial(cifar_vgg19, width=8), n_out=5)
    kept = next(i for i, s in enumerate(full.shapes) if s == planned.shapes[0])
    assert [m[0].stride for m in planned.heads[0].convs] == [
        m[0].stride for m in full.heads[kept].convs
    ]  # the network's own plan for that exit


@pytest.mark.parametrize(
    'arch,wide',
    [
        (resnet18, False),
        (resnet50, True),
        (cifar_resnet50, False),
        (tiny_resnet, False),
        (models.wide_resnet50_2, False),
    ],
)
def test_cost_decides_which_head(arch, wide):
    model = multi_exit(arch, n_out=10)
    assert (
        type(model.heads[0]) is (SeparableHead if wide else ExitHead)
        and model.made['head']['name'] == type(model.heads[0]).__name__
    )
    side = 32 if arch in (cifar_resnet50, tiny_resnet) else 224
    dear = exit_costs(model, side).costs_more_than_main.tolist()
    assert dear == [
        False,
        False,
        arch is cifar_resnet50,
        False,
    ]  # the paper's network keeps the exits that its table has
    if wide:
        assert exit_costs(multi_exit(arch, n_out=10, head=ExitHead), side).costs_more_than_main.tolist() == [
            False,
            False,
            True,
            False,
        ]


def test_activation_memory_by_hand():
    "By hand, on a network whose maps can be counted"
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    costs = exit_costs(multi_exit(net, cuts=[3]), 64)
    assert costs.activation_mb.iloc[-1] * 1e6 == 4 * 64 * 64 * (
        3 + 8 + 8
    )  # the image, which the caller keeps, and what the ReLU gets and gives


def test_costs_as_a_plot():
    df = exit_costs(multi_exit(cifar_resnet50, n_out=100, size=32), 32)
    ax = plot_costs(df)
    colours = [p.get_facecolor() for p in ax.patches]
    assert [p.get_width() for p in ax.patches] == df.share.tolist() and colours[2] != colours[0] == colours[
        1
    ] == colours[3]
    assert ax.texts[2].get_text().startswith('103%, maps ')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_heads_are_built_where_the_stages_are():
    model = multi_exit(tiny_resnet).cuda().to(memory_format=torch.channels_last).build(10)
    assert all(p.is_cuda for p in model.parameters())
    assert model.all_exits(torch.randn(2, 3, 32, 32, device='cuda'))[0].shape == (2, 4, 10)


def test_pretrained_statistics_are_the_networks_own():
    pytest.importorskip('timm', reason="timm is an extra: pip install 'eed_fastai[timm]'")
    from eed_fastai.learner import _pretrained_stats

    assert _pretrained_stats(resnet18) == imagenet_stats
    mean, std = _pretrained_stats('convnext_tiny')
    assert len(mean) == len(std) == 3 and all(0 < o < 1 for o in mean + std)
    assert tuple(_pretrained_stats('vit_base_patch16_224.augreg_in21k')[0]) == (0.5, 0.5, 0.5)
