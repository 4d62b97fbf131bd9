"Stages are the backbone: same answers, same running statistics, a gradient for every parameter."
import pytest
from conftest import *
from fastai.vision.models import xresnet

def timm_net(name):
    timm = pytest.importorskip('timm', reason="timm is an extra: pip install 'eed_fastai[timm]'")
    return timm.create_model(name)

makers = dict(resnet18=resnet18, resnet34=resnet34, resnet50=resnet50, resnext50=models.resnext50_32x4d, wide_resnet50=models.wide_resnet50_2, vgg11_bn=models.vgg11_bn,
              mobilenet_v2=models.mobilenet_v2, xresnet18=xresnet.xresnet18, cifar_resnet18=tiny_resnet,
              timm_resnet18=partial(timm_net, 'resnet18'), timm_resnet26d=partial(timm_net, 'resnet26d'))

@pytest.mark.parametrize('make', makers.values(), ids=makers)
def test_multi_exit_is_the_backbone(make):
    net = make()
    copy = deepcopy(net)
    model = multi_exit(net, size=224 if isinstance(net, models.VGG) else 64)
    x = torch.randn(2, 3, 96, 80)
    model.eval(); copy.eval()
    with torch.no_grad(): assert torch.allclose(model(x), copy(x), rtol=1e-4, atol=1e-5)
    # in a row, bit by bit: what the classifier gets
    tail = next(m for m in copy.modules() if isinstance(m, (nn.AdaptiveAvgPool2d, nn.Dropout)) or type(m).__name__=='SelectAdaptivePool2d') if not isinstance(copy, models.MobileNetV2) else copy.classifier
    seen = []
    tail.register_forward_pre_hook(lambda _,a: seen.append(a[0].clone()))
    with torch.no_grad(): copy(x); z = nn.Sequential(*model.stages)(x)
    if not isinstance(copy, xresnet.XResNet): assert torch.equal(z, seen[0]) or torch.allclose(z.mean((2,3)), seen[0], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'cifar_resnet18'])
def test_same_running_statistics_and_all_gradients(name):
    net = makers[name]()
    copy = deepcopy(net)
    model = multi_exit(net).train(); copy.train()
    x = torch.randn(4, 3, 64, 64)
    z,_ = model.all_exits(x)
    copy(x)
    ours = [m for m in model.stages.modules() if isinstance(m, nn.BatchNorm2d)]
    theirs = [m for m in copy.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(ours)==len(theirs)
    for a,b in zip(ours, theirs): assert torch.equal(a.running_mean, b.running_mean) and torch.equal(a.running_var, b.running_var)
    z.sum().backward()
    assert all(p.grad is not None for p in model.parameters())

def test_cutting_moves_no_statistics():
    net = resnet18()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    multi_exit(net)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and net.training

def test_state_dict_round_trip():
    a,b = multi_exit(tiny_resnet, n_out=10),multi_exit(tiny_resnet, n_out=10)
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 3, 32, 32)
    a.eval(); b.eval()
    assert torch.equal(a(x), b(x)) and torch.equal(a.all_exits(x).feats, b.all_exits(x).feats)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_heads_are_built_where_the_stages_are():
    model = multi_exit(tiny_resnet).cuda().to(memory_format=torch.channels_last).build(10)
    assert all(p.is_cuda for p in model.parameters())
    assert model.all_exits(torch.randn(2,3,32,32, device='cuda'))[0].shape == (2,4,10)

def test_pretrained_statistics_are_the_networks_own():
    pytest.importorskip('timm', reason="timm is an extra: pip install 'eed_fastai[timm]'")
    from eed_fastai.learner import _pretrained_stats
    assert _pretrained_stats(resnet18) == imagenet_stats
    mean,std = _pretrained_stats('convnext_tiny')
    assert len(mean)==len(std)==3 and all(0<o<1 for o in mean+std)
    assert tuple(_pretrained_stats('vit_base_patch16_224.augreg_in21k')[0]) == (0.5, 0.5, 0.5)
