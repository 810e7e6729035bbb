from transformers.models.camembert import modeling_camembert as camembert

from . import _bert_shaped as shaped


class PaddingFreeCamembertEncoder(shaped.PaddingFreeEncoder, camembert.CamembertEncoder):
    pass


class FusedCamembertLayer(shaped.FusedLayer, camembert.CamembertLayer):
    containers = shaped.containers(camembert, "Camembert")


class FusedCamembertEmbeddings(shaped.FusedEmbeddingsAfterPadding, camembert.CamembertEmbeddings):
    pass
