from transformers.models.roberta import modeling_roberta as roberta

from . import _bert_shaped as shaped


class PaddingFreeRobertaEncoder(shaped.PaddingFreeEncoder, roberta.RobertaEncoder):
    pass


class FusedRobertaLayer(shaped.FusedLayer, roberta.RobertaLayer):
    containers = shaped.containers(roberta, "Roberta")


class FusedRobertaEmbeddings(shaped.FusedEmbeddingsAfterPadding, roberta.RobertaEmbeddings):
    pass
