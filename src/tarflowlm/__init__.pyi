# the public names, for type checkers, and the module of each, which __init__.py reads
from tarflowlm.baseline import TokenLM as TokenLM
from tarflowlm.config import RunConfig as RunConfig
from tarflowlm.config import optimizer as optimizer
from tarflowlm.config import schedule as schedule
from tarflowlm.config import tokenizer as tokenizer
from tarflowlm.errors import UserError as UserError
from tarflowlm.evaluation.likelihood import evaluate as evaluate
from tarflowlm.evaluation.scores import Scores as Scores
from tarflowlm.evaluation.scores import score as score
from tarflowlm.generation.generate import generate as generate
from tarflowlm.model import TarFlowLM as TarFlowLM
from tarflowlm.model_config import BaselineConfig as BaselineConfig
from tarflowlm.model_config import FlowConfig as FlowConfig
from tarflowlm.model_config import coupling as coupling
from tarflowlm.model_config import layer as layer
from tarflowlm.objective import elbo as elbo
from tarflowlm.objective import importance_weighted_bound as importance_weighted_bound
from tarflowlm.presets import preset as preset
from tarflowlm.pretrained import Pretrained as Pretrained
from tarflowlm.pretrained import from_pretrained as from_pretrained
from tarflowlm.pretrained import load as load
from tarflowlm.pretrained import resume as resume
from tarflowlm.pretrained import train as train

__version__: str
