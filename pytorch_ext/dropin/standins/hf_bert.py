from transformers.models.bert import modeling_bert as bert

from . import _bert_shaped as shaped


class PaddingFreeBertEncoder(shaped.PaddingFreeEncoder, bert.BertEncoder):
    pass


class FusedBertLayer(shaped.FusedLayer, bert.BertLayer):
    containers = shaped.containers(bert, "Bert")


class FusedBertEmbeddings(shaped.FusedEmbeddings, bert.BertEmbeddings):
    pass


class FusedBertPredictionHeadTransform(shaped.FusedHeadTransform, bert.BertPredictionHeadTransform):
    pass
