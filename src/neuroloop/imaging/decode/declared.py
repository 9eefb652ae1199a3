"""What a DICOM header says of its image: evidence for the gate, in the few words that may leave this room.

The values are the sender's. Only those found here are passed on, so that a name in the wrong field goes no further.
"""

from collections.abc import Iterable

MR = "MR"
OTHER_MODALITY = "another modality"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MODALITIES = _words("""
    AR ASMT AU BDUS BI BMD CR CT CTPROTOCOL DG DMS DOC DX ECG EEG EMG EOG EPS ES FID GM HC HD IO IOL IVOCT IVUS KER KO
    LEN LS MG M3D NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS PA PLAN POS PR PT PX REG RESP RF RG RTDOSE RTIMAGE
    RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XAPROTOCOL XC
""")
_ELSEWHERE = _words("""
    ABDOMEN ABDOMENPELVIS ADRENAL ANKLE AORTA ARM AXILLA BACK BILEDUCT BLADDER BREAST BRONCHUS BUTTOCK CALCANEUS CALF
    CHEST CHESTABDOMEN CHESTABDPELVIS CLAVICLE COCCYX COLON CSPINE CTSPINE DUODENUM ELBOW ESOPHAGUS EXTREMITY FEMUR
    FINGER FOOT FOREARM GALLBLADDER HAND HEART HIP HUMERUS ILEUM JEJUNUM KIDNEY KNEE LEG LIVER LOWERLEG LOWERLIMB LSPINE
    LSSPINE LUNG MEDIASTINUM OVARY PANCREAS PELVIS PENIS PROSTATE RECTUM RIB SCAPULA SCROTUM SHOULDER SIJOINT SMALLBOWEL
    SPINE SPLEEN SSPINE STERNUM STOMACH TESTIS THIGH THORAX THUMB THYMUS TIBIA TLSPINE TOE TSPINE UPPERARM UPPERLIMB
    URETER URETHRA UTERUS VAGINA WRIST
""")


_SAYS_NOTHING = _words("OT SC")  # other, and secondary capture: so key images and reformats of MR are marked, too


def modality(value: object) -> str:
    """`MR`, another code of the standard, `OTHER_MODALITY` where it is neither, empty where none is said.

    Of several, it is MR where that is among them.
    """
    several = [value] if value is None or isinstance(value, str) else list(value) if isinstance(value, Iterable) else []
    codes = {_word(each) for each in several} - _SAYS_NOTHING - {""}
    if not codes or MR in codes:
        return MR if codes else ""
    return codes.pop() if len(codes) == 1 and codes <= _MODALITIES else OTHER_MODALITY


def body_part(value: object) -> str:
    """The code of a body part that is not the head; empty for the head, for none, and for words unknown here."""
    code = _word(value)
    return code if code in _ELSEWHERE else ""


def objection(modality: str, body_part: str) -> str:
    """Why an image so declared is no MRI of a brain, in words; empty where nothing speaks against it."""
    if modality and modality != MR:
        said = "another modality than MR" if modality == OTHER_MODALITY else f"the modality {modality}, not MR"
        return f"The DICOM header says {said}."
    if body_part:
        return f"The DICOM header says that the image shows another part of the body ({body_part})."
    return ""


def _word(value: object) -> str:
    """A value as the standard spells codes: capitals without blanks and hyphens."""
    return "" if value is None else "".join(str(value).upper().replace("-", "").replace("_", "").split())
