"""The vocabulary of the public notes, which have no label: for each department, complaints and
findings.

The phrases are a layman's, not a clinic's: no public note shares a phrase with a hospital's
note."""

from __future__ import annotations

from fedtune.demo.phrases import split

LIBRARY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "heart": (
        split("""angina during exercise; palpitations; swelling of the feet from a weak heart
        muscle; collapse from a slow rhythm; discomfort in the chest spreading to the jaw"""),
        split(
            """coronary disease; mitral valve leakage; hypertension; cardiac arrhythmia;
            cardiomyopathy"""
        ),
    ),
    "lungs": (
        split("""shortness of breath with wheezing; a smoker's cough; sputum and fever;
        asthma attacks; low oxygen during exercise"""),
        split(
            """emphysema; airway obstruction on spirometry; pneumonia; lung fibrosis; pleurisy"""
        ),
    ),
    "gut": (
        split(
            """indigestion; chronic diarrhoea; nausea and jaundice; abdominal cramps; rectal
            bleeding"""
        ),
        split("""gastritis; liver disease; an inflamed colon; gallstones; acid reflux"""),
    ),
    "nerves": (
        split(
            """seizures; memory decline; sudden paralysis on one side; tremor; severe migraine
            attacks"""
        ),
        split(
            """cerebral ischaemia; dementia; demyelination; a brain tumour; nerve damage in
            the limbs"""
        ),
    ),
    "bones": (
        split(
            """joint pain; a sports injury; a broken arm; lower back strain; swelling of the
            knees"""
        ),
        split("""arthritis; a vertebral fracture; a ruptured tendon; bone loss; cartilage
        wear"""),
    ),
    "skin": (
        split("""dry itching skin; a spreading rash; pimples; dark moles; nettle rash"""),
        split("""dermatitis; skin cancer; a fungal infection of the skin; urticaria; impetigo"""),
    ),
    "eyes": (
        split(
            """dim eyesight; irritated watery eyes; flashes in the visual field; squinting;
            night blindness"""
        ),
        split(
            """raised eye pressure; a clouded lens; conjunctivitis; retinal damage; an
            inflamed cornea"""
        ),
    ),
    "kidneys": (
        split(
            """painful urination; blood in the urine; incontinence; frequent urination; flank
            colic"""
        ),
        split(
            """renal failure; urinary infection; prostate disease; bladder stones; nephrotic
            syndrome"""
        ),
    ),
    "mind": (
        split("""persistent sadness; anxiety attacks; hallucinations; compulsive rituals; mania"""),
        split(
            """major depression; psychosis; post-traumatic stress; an eating disorder;
            addiction"""
        ),
    ),
    "ears": (
        split("""hearing loss; vertigo; a blocked nose; hoarseness; earache"""),
        split("""sinusitis; an inflamed middle ear; laryngitis; tinnitus; inflamed tonsils"""),
    ),
    "teeth": (
        split("""toothache; bleeding gums; a stiff jaw; sensitive enamel; a mouth sore"""),
        split("""caries; periodontitis; a dental abscess; bruxism; a cracked tooth"""),
    ),
    "blood": (
        split(
            """easy bruising; pallor with fatigue; prolonged bleeding; frequent fevers from few
            white cells; small red spots"""
        ),
        split("""anaemia; leukaemia; haemophilia; iron deficiency; a low platelet count"""),
    ),
    "hormones": (
        split(
            """great thirst; sudden weight gain; intolerance of cold; a goitre; trembling from
            low sugar"""
        ),
        split(
            """diabetes; thyroid disease; adrenal failure; a pituitary tumour; a high calcium
            level"""
        ),
    ),
    "vessels": (
        split(
            """leg pain on walking; varicose veins; a cold limb; a swollen leg; slow healing of
            the foot"""
        ),
        split(
            """peripheral artery disease; venous thrombosis; an aortic aneurysm; venous
            insufficiency; a blocked artery of the leg"""
        ),
    ),
    "infections": (
        split(
            """fever after travel; shivering with sweats; an infected wound; swollen lymph glands;
            a tick bite"""
        ),
        split("""malaria; tuberculosis; blood poisoning; a virus of the immune system; a
        parasite"""),
    ),
    "sleep": (
        split(
            """loud snoring; sleepiness by day; sleeplessness; twitching legs; walking while
            asleep"""
        ),
        split(
            """pauses of breath at night; an irresistible urge to nap; a disturbed body clock;
            chronic insomnia; night terrors"""
        ),
    ),
    "allergy": (
        split(
            """sneezing in spring; swelling of the face after food; a reaction to a sting; watery
            nose near animals; swelling of the throat"""
        ),
        split(
            """anaphylactic shock; pollen allergy; food allergy; an insect venom allergy;
            angioedema"""
        ),
    ),
    "cancer": (
        split(
            """a lump in the breast; unexplained weight loss; sickness from chemotherapy; a
            growing node; tiredness under radiation"""
        ),
        split(
            """a malignant tumour; metastases; a carcinoma; lymph node spread; a positive
            biopsy"""
        ),
    ),
}
