"Everything for everyday use: `from eed_fastai.all import *`"
from eed_fastai.data import *
from eed_fastai.models import *
from eed_fastai.stages import split_stages
from eed_fastai.exits import *
from eed_fastai.model import *
from eed_fastai.teachers import *
from eed_fastai.losses import *
from eed_fastai.metrics import *
from eed_fastai.callback import *
from eed_fastai.learner import *
from eed_fastai.inference import *
from eed_fastai.analysis import *
from eed_fastai.export import *
