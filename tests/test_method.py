"The objective that really reaches the parameters, against one written by hand for this file."
import pytest
from conftest import *

def softmax(v): e = (v-v.max(-1, keepdim=True).values).exp(); return e/e.sum(-1, keepdim=True)

def by_hand(recipe, zs, fs, y):
    "The loss of `recipe`, written out exit by exit from the paper's equations and the code's weights"
    T,k = 3.,len(zs)
    loss = sum(-softmax(z).gather(1, y[:,None]).log().mean() for z in zs)                                     # eq. 2
    if recipe=='joint_ce': return loss
    conventional = recipe.startswith('main')
    G,GF = (zs[-1],fs[-1]) if conventional else (sum(zs)/k, sum(fs)/k)
    G,GF = G.detach(),GF.detach()
    students = range(k-1 if conventional else k)                                                              # eq. 4: i < k; eq. 8: i <= k
    kl = lambda z: (softmax(G/T)*(softmax(G/T).log()-softmax(z/T).log())).sum(1).mean()
    mse = lambda a,b: ((a-b)**2).mean()
    weight = 0.1*T**2 if 'kl' in recipe and 'code' in recipe else 1.
    loss = loss + weight*sum(kl(zs[i]) if 'kl' in recipe else mse(zs[i], G) for i in students)
    return loss + sum(mse(fs[i], GF) for i in students) if 'feat' in recipe else loss

@pytest.mark.parametrize('recipe', recipes)
def test_every_recipe_is_its_equations(recipe):
    "Loss and gradient of every parameter, in float64"
    model = multi_exit(tiny_resnet, n_out=10).double()
    learn = make_learner(EEDCallback(**recipes[recipe]), model=model, loss_func=nn.CrossEntropyLoss())   # fastai's flat one is off by 3e-7 in float64
    xb,yb = (o.as_subclass(Tensor) for o in learn.dls.one_batch())
    xb = xb.double()
    # the callback makes outputs float32; here they stay float64, so that the comparison is exact
    zs,fs = zip(*model_outputs(model.train(), xb))
    learn.xb,learn.yb,learn.training = (xb,),(yb,),True
    cb = learn._grab_cbs(EEDCallback)[0]
    z,f = torch.stack(zs, 1),torch.stack(fs, 1)
    loss = F.cross_entropy(z[:,-1], yb) + sum(cb._terms(z, f).values())
    ours = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    expected = by_hand(recipe, zs, fs, yb)
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    assert abs(loss-expected) < 1e-10
    for a,b in zip(ours, theirs): assert (a-b).abs().max() < 1e-10*max(1, b.abs().max())

def model_outputs(model, x):
    for stage,head in model:
        x = stage(x)
        yield head(x)

@pytest.mark.parametrize('recipe', ['joint_ce', 'eed_mse_feat', 'eed_kl_code', 'main_kl_feat'])
def test_a_real_step_has_these_gradients(recipe):
    "The same through a real fit, in float32: the gradients of the first step"
    grads = []
    class Keep(Callback):
        order = 100
        def before_step(self):
            grads.append([p.grad.clone() for p in self.model.parameters()])
            raise CancelFitException()
    dls = small_digits()
    dls.train = dls.train.new(shuffle=False)
    model = multi_exit(tiny_resnet, n_out=10)
    start = deepcopy(model)
    with (learn := make_learner([EEDCallback(**recipes[recipe]), Keep()], dls=dls, model=model)).no_logging(): learn.fit(1)
    xb,yb = (o.as_subclass(Tensor) for o in first(dls.train))
    zs,fs = zip(*model_outputs(start.train(), xb))
    expected = torch.autograd.grad(by_hand(recipe, zs, fs, yb), list(start.parameters()))
    for a,b in zip(grads[0], expected): assert torch.allclose(a, b, rtol=2e-3, atol=2e-5)

def test_a_broken_sign_would_be_seen():
    "The comparison above can fail: the wrong teacher, weight or sign is far outside its bounds"
    z = torch.randn(8, 3, 5, dtype=torch.float64)
    y = torch.randint(5, (8,))
    right = by_hand('eed_mse', list(z.unbind(1)), list(z.unbind(1)), y)
    for wrong in (exit_ce(z, y) - logit_mse(z, ensemble_teacher(z)), exit_ce(z, y) + logit_mse(z, main_teacher(z)), exit_ce(z, y) + 0.9*logit_mse(z, ensemble_teacher(z))):
        assert abs(wrong-right) > 1e-3
    assert abs(exit_ce(z, y) + logit_mse(z, ensemble_teacher(z)) - right) < 1e-10

def test_alpha_and_beta_zero_is_joint_ce():
    runs = []
    for kw in (dict(alpha=0., beta=0.), dict(alpha=0., beta=0., teacher=main_teacher, logit_loss=logit_kl), recipes['joint_ce']):
        set_seed(3)
        learn = make_learner(EEDCallback(**kw), model=multi_exit(tiny_resnet, n_out=10))
        with learn.no_logging(): learn.fit(1)
        runs.append(torch.cat([p.flatten() for p in learn.model.parameters()]).detach())
        assert set(learn.metrics.attrgot('name')) & {'logit_loss','feat_loss'} == set()
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])

def test_recipes_are_the_papers():
    assert set(recipes) == {'joint_ce'} | {f'{a}_{b}{c}' for a in ('main','eed') for b in ('kl','mse') for c in ('','_feat')} | {f'eed_{b}{c}_code' for b in ('kl','mse') for c in ('','_feat')}
    assert all('EED' in r.source for r in recipes.values())
    assert {n: recipes[n]['alpha'] for n in ('eed_kl','eed_kl_code','eed_mse','eed_mse_code')} == dict(eed_kl=1., eed_kl_code=0.9, eed_mse=1., eed_mse_code=1.)

def test_digits_are_learned_by_every_exit():
    "A short real run: the first exit learns too, and the ensemble is no worse than the worst exit"
    learn = make_learner(EEDCallback(), dls=digits_dls(), model=multi_exit(partial(cifar_resnet18, width=16)))
    with learn.no_logging(): learn.fit_one_cycle(4, 1e-2)
    df = learn.validate_exits().set_index('exit').accuracy
    assert df['exit0'] > 0.9 and df['main'] > 0.95 and df['ensemble'] >= df.min()
