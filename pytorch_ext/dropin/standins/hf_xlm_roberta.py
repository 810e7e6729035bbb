from transformers.models.xlm_roberta import modeling_xlm_roberta as xlm_roberta

from . import _bert_shaped as shaped


class PaddingFreeXLMRobertaEncoder(shaped.PaddingFreeEncoder, xlm_roberta.XLMRobertaEncoder):
    pass


class FusedXLMRobertaLayer(shaped.FusedLayer, xlm_roberta.XLMRobertaLayer):
    containers = shaped.containers(xlm_roberta, "XLMRoberta")


class FusedXLMRobertaEmbeddings(shaped.FusedEmbeddingsAfterPadding, xlm_roberta.XLMRobertaEmbeddings):
    pass
