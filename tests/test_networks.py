"The paper's networks, narrow: exits where they belong, stages that are the network, a gradient for every parameter."

import pytest
from conftest import *
from eed_fastai.exits import BottleneckHead, PooledHead

makers = dict(
    resnet18=tiny_resnet,
    resnet50=partial(cifar_resnet50, width=8),
    resnet101=partial(cifar_resnet101, width=8),
    resnet152=partial(cifar_resnet152, width=8),
    vgg19=partial(cifar_vgg19, width=8),
    resnext29=partial(cifar_resnext29, width=8),
    wrn28_10=partial(cifar_wrn28_10, width=16),
    pyramidnet110=partial(cifar_pyramidnet110, width=8),
)
side = {'vgg19': 1, **{o: 8 for o in ('resnext29', 'wrn28_10', 'pyramidnet110')}}


@pytest.mark.parametrize('name', makers)
def test_a_network_with_exits_is_the_network(name):
    net = makers[name](n_out=7, n_in=1)
    copy = deepcopy(net)
    model = multi_exit(net)
    assert model.n_exits == (3 if name in ('resnext29', 'wrn28_10', 'pyramidnet110') else 4) and model.shapes[-1][
        1
    ] == 2 * side.get(name, 4)  # the probe has 64 pixels
    x = torch.randn(3, 1, 32, 32)
    model.eval()
    copy.eval()
    with torch.no_grad():
        assert torch.equal(model(x), copy(x))
    model.train()
    copy.train()
    copy(x)
    z, f = model.all_exits(x)
    assert z.shape == (3, model.n_exits, 7) and f.shape == (3, model.n_exits, model.feature_sizes[-1][0])
    (z.sum() + f.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    ours, theirs = ([m for m in o.modules() if isinstance(m, nn.BatchNorm2d)] for o in (model.stages, copy))
    assert len(ours) == len(theirs) and all(torch.equal(a.running_mean, b.running_mean) for a, b in zip(ours, theirs))


@pytest.mark.parametrize('name', makers)
@pytest.mark.parametrize('head', [BottleneckHead, PooledHead])
def test_other_heads_fit_every_network(name, head):
    model = multi_exit(makers[name], n_out=7, head=head).eval()
    assert model.all_exits(torch.randn(2, 3, 32, 32)).logits.shape == (2, model.n_exits, 7)


def test_an_exit_sees_its_pre_activation():
    model = multi_exit(makers['wrn28_10'], n_out=7)
    x = model.stages[0](torch.randn(4, 3, 32, 32))
    assert (x < 0).any()  # no ReLU has been here
    model.heads[0][2].register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    seen = []
    model.heads[0](x)
    assert (seen[0] >= 0).all() and abs(model.heads[0][0](x).mean().item()) < 1e-3


def test_cuts_of_ones_own_replace_the_plan():
    model = multi_exit(makers['vgg19'], n_out=7, cuts=['layer2'])
    assert model.n_exits == 2 and [m[0].stride[0] for m in model.heads[0].convs] == [2] * 3


def test_plan_survives_copies_and_files(tmp_path):
    net = makers['resnet50'](n_out=7)
    torch.save(net, tmp_path / 'net.pth')
    again = torch.load(tmp_path / 'net.pth', weights_only=False)
    assert again.exit_plan == net.exit_plan == deepcopy(net).exit_plan
    model = deepcopy(multi_exit(makers['resnet50']))  # built only after the copy
    assert model.build(7).feature_sizes == [(256,)] * 4


def test_the_costs_of_beeds_exits():
    "Counted from its code: 0.304, 0.388, 0.472 and 0.555 GMAC to the exits, and features of one size"
    model = multi_exit(cifar_resnet18, n_out=100, head=BEEDHead)
    assert (exit_costs(model, 32).macs / 1e9).round(3).tolist() == [0.304, 0.388, 0.472, 0.555]
    assert model.all_exits(torch.randn(2, 3, 32, 32)).feats.shape == (2, 4, 512 * 16)
