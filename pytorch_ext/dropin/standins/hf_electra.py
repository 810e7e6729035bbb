from transformers.models.electra import modeling_electra as electra

from . import _bert_shaped as shaped


class PaddingFreeElectraEncoder(shaped.PaddingFreeEncoder, electra.ElectraEncoder):
    pass


class FusedElectraLayer(shaped.FusedLayer, electra.ElectraLayer):
    containers = shaped.containers(electra, "Electra")


class FusedElectraEmbeddings(shaped.FusedEmbeddings, electra.ElectraEmbeddings):
    pass
