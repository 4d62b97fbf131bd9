"Exits on any CNN: stages are the backbone, the classifier stays, every parameter learns; what cannot be cut is refused with a reason."
import pytest
from conftest import *
from fastai.vision.models import xresnet
from eed_fastai.stages import *
from eed_fastai.exits import KeptHead, default_head
from eed_fastai.model import plot_costs

torchvision_names = '''alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 squeezenet1_1 densenet121 shufflenet_v2_x1_0 mobilenet_v2 mobilenet_v3_small
    mnasnet1_0 efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny'''.split()
timm_names = '''resnet18 resnet26d resnetv2_50 efficientnet_b0 mobilenetv3_small_100 mobilenetv4_conv_small convnext_tiny convnextv2_atto regnetx_002 regnety_002 densenet121 vgg11_bn repvgg_a0'''.split()
slow = {'wide_resnet50_2','resnext50_32x4d','efficientnet_v2_s','convnext_tiny','vgg11_bn','timm-convnext_tiny','timm-resnetv2_50','timm-vgg11_bn','timm-densenet121'}

def timm_net(name, **kw): return pytest.importorskip('timm', reason="timm is an extra: pip install 'eed_fastai[timm]'").create_model(name, **kw)

zoo = {**{n: getattr(models, n) for n in torchvision_names}, 'googlenet': partial(models.googlenet, init_weights=False, aux_logits=False), **{f'timm-{n}': partial(timm_net, n) for n in timm_names},
       'xresnet18': xresnet.xresnet18, 'xresnet50': xresnet.xresnet50, 'cifar_resnet18': tiny_resnet}
every_net = pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in zoo])
n_stages = dict(alexnet=2, squeezenet1_1=3, shufflenet_v2_x1_0=3, googlenet=3, mobilenet_v2=5, efficientnet_b0=5) | {'timm-efficientnet_b0': 5}

def an_image(name, n=2): return torch.randn(n, 3, 160, 128) if name=='alexnet' else torch.randn(n, 3, 96, 75)       # odd sizes
def caught(m, net, x):
    "What `m` gives while `net` runs"
    got = []
    hook = m.register_forward_hook(lambda _,a,out: got.append(out.clone()))
    z = net(x); hook.remove()
    return got[-1] if got else None, z

@every_net
def test_a_backbone_keeps_its_answers(name):
    net = zoo[name]().eval()
    x = an_image(name)
    model = multi_exit(net).eval()
    assert model.n_exits==n_stages.get(name, 4) and isinstance(model.heads[-1], KeptHead) and not any(o.training for o in net.modules())
    with torch.no_grad():
        theirs,z = caught(net.features if name=='densenet121' else model.stages[-1][-1], net, x)
        assert torch.equal(nn.Sequential(*model.stages)(x), theirs.relu() if name=='densenet121' else theirs)         # to the last bit; densenet's last ReLU is none of its modules
        assert torch.allclose(model(x), z, rtol=1e-4, atol=1e-5)
        both = model.all_exits(x)
        assert both.logits.shape==(2,model.n_exits,z.shape[1]) and torch.allclose(both.logits[:,-1], z, rtol=1e-4, atol=1e-5)
        again = deepcopy(model)
        assert torch.equal(again.all_exits(x).logits, both.logits)
        for p in again.parameters(): p.zero_()
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
    torch.manual_seed(0); copy(x)
    torch.manual_seed(0); z = model.all_exits(x).logits
    ours,theirs = ([v for o in m.modules() if isinstance(o, nn.modules.batchnorm._BatchNorm) for v in (o.running_mean, o.running_var)] for m in (net, copy))
    assert len(ours)==len(theirs) and all(map(torch.equal, ours, theirs))                                              # the same running statistics, bit by bit
    z.square().mean().backward()
    assert not [n for n,p in model.named_parameters() if p.grad is None]
    assert {id(p) for p in net.parameters()} <= {id(p) for p in model.parameters()}                                      # nothing of the network was lost

@pytest.mark.parametrize('n_in', [1,3,4])
@every_net
def test_other_channels(name, n_in):
    arch = zoo[name] if not name.startswith('timm-') else name[5:]
    if name=='googlenet': arch = partial(models.googlenet, init_weights=False, aux_logits=False, transform_input=False)
    if isinstance(arch, str): pytest.importorskip('timm')
    model = multi_exit(arch, n_out=5, n_in=n_in)
    assert model.n_in==n_in and model(torch.randn(2, n_in, *[160 if name=='alexnet' else 64]*2)).shape==(2,5)

def test_cutting_moves_no_statistics():
    net = resnet18()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    multi_exit(net)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items()) and net.training and not any(o._forward_hooks or o._forward_pre_hooks for o in net.modules())

refused = dict(googlenet=(partial(models.googlenet, init_weights=False), 'auxiliary'), inception=(partial(models.inception_v3, init_weights=False), 'auxiliary'),
    transform=(partial(models.googlenet, init_weights=False, aux_logits=False, transform_input=True), 'from its input to conv1'), swin=(models.swin_t, 'not square'),
    vit=(partial(models.VisionTransformer, 224, 56, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8), 'no module'), timm_vit=(partial(timm_net, 'vit_tiny_patch16_224'), 'no map comes out'))
@pytest.mark.parametrize('make,why', refused.values(), ids=refused)
def test_what_cannot_be_cut_is_refused(make, why):
    net = make()
    hooks = [len(o._forward_hooks) for o in net.modules()]
    for arch in (net, make):
        with pytest.raises(ValueError, match=f'cannot be cut into stages.*{why}.*`(cuts=|aux_logits)'): multi_exit(arch, **({} if arch is net else dict(n_out=5)))
    assert [len(o._forward_hooks) for o in net.modules()]==hooks

class LeNet(nn.Module):
    "As beginners write it"
    def __init__(self):
        super().__init__()
        self.conv1,self.conv2,self.conv3,self.fc1,self.fc2 = nn.Conv2d(3,6,5),nn.Conv2d(6,16,5),nn.Conv2d(16,16,3,padding=1),nn.Linear(16*5*5, 20),nn.Linear(20, 7)
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(F.relu(self.conv3(x)), 1))))

class Encoder(nn.Module):
    def __init__(self): super().__init__(); self.parts = nn.ModuleList(resnet18().children())[:-2]
    def forward(self, x):
        for o in self.parts: x = o(x)
        return x

class Opaque(nn.Module):
    def __init__(self): super().__init__(); self.fc,self.encoder,self.drop_rate = nn.Linear(512, 7),Encoder(),.3
    def forward(self, x): return self.fc(F.dropout(self.encoder(x).mean((2,3)), self.drop_rate, self.training))

@pytest.mark.parametrize('make,size,n', [(LeNet, 32, 2), (Opaque, 64, 4)])
def test_networks_of_ones_own(make, size, n):
    net = make().eval()
    model = multi_exit(net).eval()
    x = torch.randn(2, 3, size, size)
    assert model.n_exits==n and model.size==size
    with torch.no_grad(): assert torch.allclose(model(x), net(x), rtol=1e-4, atol=1e-5)
    if make is Opaque: assert [o.p for o in model.heads[-1].body if isinstance(o, nn.Dropout)]==[.3]           # a function in `forward`, put back as a module

class Odd(nn.Module):
    def __init__(self): super().__init__(); self.net = tiny_resnet()
    def forward(self, x):
        for m in self.net[:3]: x = m(x)
        return self.net[3:](x.sin())

def test_a_function_that_is_unknown_is_named():
    with pytest.raises(ValueError, match='from net.layer1.1 to net.layer2.0, its `forward` does something for which it has no module'): multi_exit(Odd())

def test_a_stage_that_begins_in_place():
    net = nn.Sequential(nn.Conv2d(3,8,3,1,1), nn.BatchNorm2d(8), nn.Conv2d(8,8,3,1,1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8,16,3,2,1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    model = multi_exit(net, cuts=['4'])
    assert isinstance(model.stages[1][0], Copied)
    z = model.all_exits(torch.randn(4,3,32,32)).logits
    z.sum().backward()                                       # without the copy: 'modified by an inplace operation'

def test_cuts_inside_a_closed_stage():
    net = timm_net('convnextv2_atto')
    model = multi_exit(net, cuts=['stages.1', 'stages.2.blocks.3', 'stages.3'])
    x = torch.randn(2, 3, 64, 64)
    with evaluating(model), evaluating(net): assert torch.allclose(model(x), net(x), rtol=1e-4, atol=1e-5)
    assert model.n_exits==4 and model.shapes[1][1]==model.shapes[2][1]
    with pytest.raises(ValueError, match="'stages.7', at which no stage can begin; the parts after the first are"): multi_exit(net, cuts=['stages.7'])

def test_fewer_exits_at_equal_shares():
    model = multi_exit(resnet18, n_out=5, n_exits=3)
    assert [s[0] for s in model.shapes]==[64,256,512] and model.made['n_exits']==3
    macs = np.array(stage_macs(split_stages(resnet18())))
    ends = spread_exits(split_stages(resnet18()), 3)
    share = (macs.cumsum()/macs.sum())
    import itertools
    best = min(itertools.combinations(range(3), 2), key=lambda c: sum((share[i]-w)**2 for i,w in zip(c, (1/3,2/3))))
    assert tuple(ends[:-1])==best
    planned = multi_exit(partial(cifar_vgg19, width=8), n_out=5, n_exits=2)
    full = multi_exit(partial(cifar_vgg19, width=8), n_out=5)
    kept = next(i for i,s in enumerate(full.shapes) if s==planned.shapes[0])
    assert [m[0].stride for m in planned.heads[0].convs]==[m[0].stride for m in full.heads[kept].convs]             # the network's own plan for that exit

@pytest.mark.parametrize('arch,wide', [(resnet18, False), (resnet50, True), (cifar_resnet50, False), (tiny_resnet, False), (models.wide_resnet50_2, False)])
def test_cost_decides_which_head(arch, wide):
    model = multi_exit(arch, n_out=10)
    assert type(model.heads[0]) is (SeparableHead if wide else ExitHead) and model.made['head']['name']==type(model.heads[0]).__name__
    side = 32 if arch in (cifar_resnet50, tiny_resnet) else 224
    dear = exit_costs(model, side).dear.tolist()
    assert dear==[False,False,arch is cifar_resnet50,False]              # the paper's network keeps the exits that its table has
    if wide: assert exit_costs(multi_exit(arch, n_out=10, head=ExitHead), side).dear.tolist()==[False,False,True,False]

def test_activation_memory_by_hand():
    "By hand, on a network whose maps can be counted"
    net = nn.Sequential(nn.Conv2d(3,8,1), nn.ReLU(), nn.Conv2d(8,4,1), nn.MaxPool2d(2), nn.Conv2d(4,4,1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,2))
    costs = exit_costs(multi_exit(net, cuts=[3]), 64)
    assert costs.activation_mb.iloc[-1]*1e6==4*64*64*(3 + 8+8)           # the image, which the caller keeps, and what the ReLU gets and gives

def test_costs_as_a_plot():
    df = exit_costs(multi_exit(cifar_resnet50, n_out=100, size=32), 32)
    ax = plot_costs(df)
    colours = [p.get_facecolor() for p in ax.patches]
    assert [p.get_width() for p in ax.patches]==df.share.tolist() and colours[2]!=colours[0]==colours[1]==colours[3]
    assert ax.texts[2].get_text().startswith('103%, maps ')

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
