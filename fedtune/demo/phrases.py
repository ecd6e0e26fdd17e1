"""The words that the hospital notes are made of: nine departments, all phrases invented.

`CLINIC` writes the hospitals' notes (train, validation and test). `LIBRARY` writes the public
notes, in other words and from a reader's distance: no public note shares a phrase with theirs.
"""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """What one department's notes draw from."""

    complaints: tuple[str, ...]
    findings: tuple[str, ...]
    history: tuple[str, ...]
    medication: tuple[str, ...]


def _words(complaints: str, findings: str, history: str, medication: str) -> Words:
    return Words(*map(_split, (complaints, findings, history, medication)))


def _split(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(";"))


CLINIC: dict[str, Words] = {
    "heart": _words(
        """chest tightness on climbing stairs; crushing chest pain at rest; a racing heartbeat
        at night; missed heartbeats after coffee; fainting on the bus; breathlessness lying
        flat; both ankles swollen by evening; pressure behind the breastbone; pain running
        down the left arm; thumping in the chest; dizziness on standing up; waking up gasping
        for air""",
        """an irregular pulse of 130; a loud systolic murmur; ST depression on the ECG; a
        raised troponin; an ejection fraction of 35 percent; a raised jugular pulse; pitting
        oedema to the knees; blood pressure of 188 over 104; a third heart sound; a tight
        aortic valve on echo; long pauses on the Holter; a narrowed left coronary artery""",
        """an old heart attack; a pacemaker; atrial fibrillation; two coronary stents; high
        blood pressure; a bypass operation; rheumatic fever; heart failure""",
        """bisoprolol; ramipril; nitrate spray; amiodarone; furosemide; digoxin; apixaban;
        ivabradine""",
    ),
    "lungs": _words(
        """a wheezy cough since Monday; coughing up green phlegm; breathlessness on short
        walks; rust-coloured sputum; a dry cough all night; tightness and whistling on
        breathing out; a stitch on deep breaths; coughing up streaks of blood; a barking cough
        with fever; needing the inhaler every hour; puffing after one flight; a cough since
        the factory job""",
        """crackles at the right base; an oxygen saturation of 86 percent; a peak flow of 180;
        a shadow in the upper lobe; a pleural effusion; dullness to percussion on the left;
        widespread expiratory wheeze; a collapsed lung on the film; FEV1 at 42 percent;
        bronchial breathing; a thickened pleura; a clot in the pulmonary artery""",
        """childhood asthma; COPD; forty pack-years; treated tuberculosis; asbestos exposure;
        bronchiectasis; sleep apnoea; pneumonia last winter""",
        """salbutamol; tiotropium; a steroid inhaler; home oxygen; montelukast; doxycycline;
        theophylline; rifampicin""",
    ),
    "gut": _words(
        """burning after spicy meals; black tarry stools; cramps and loose stools for weeks;
        vomiting after every dinner; food sticking on the way down; yellow eyes and itching;
        bloating after bread; blood on the toilet paper; pain under the right ribs after fat;
        no bowel movement for a week; heartburn on lying down; a swollen belly since spring""",
        """a tender upper abdomen; stones in the gallbladder; an enlarged liver edge; an ulcer
        on gastroscopy; raised bilirubin; shifting dullness; a polyp at colonoscopy; high
        lipase; tinkling bowel sounds; flat villi on biopsy; guarding in the right lower
        belly; varices in the oesophagus""",
        """Crohn disease; a hiatus hernia; hepatitis C; coeliac disease; ulcerative colitis;
        cirrhosis; a stomach ulcer; pancreatitis""",
        """omeprazole; mesalazine; lactulose; loperamide; ursodiol; metoclopramide; senna; a
        fat enzyme capsule""",
    ),
    "nerves": _words(
        """a drooping face since breakfast; throbbing headache with flashing zigzags; a
        shaking right hand; slurred speech for ten minutes; tingling up both legs; a fit in
        the supermarket; lost words and lost keys; shooting pain across the cheek; numb
        fingers on the left side; staggering like a drunk; a thunderclap headache; dragging
        one foot""",
        """an upgoing plantar response; weakness of the left arm; cogwheel rigidity; slow
        waves on the EEG; a lesion in the white matter; brisk reflexes; neck stiffness; a
        fresh infarct on the brain scan; loss of vibration sense; nystagmus to the right; a
        pill-rolling tremor; oligoclonal bands""",
        """epilepsy; a stroke; multiple sclerosis; migraine; Parkinson disease; meningitis as
        a child; a mini-stroke; neuropathy""",
        """levetiracetam; levodopa; sumatriptan; carbamazepine; gabapentin; interferon;
        donepezil; valproate""",
    ),
    "bones": _words(
        """a twisted knee at football; a stiff hip in the morning; a fall on an outstretched
        hand; back pain after lifting crates; a shoulder that will not lift; a swollen big toe
        joint; a clicking knee on stairs; heel pain with first steps; a wrist bent out of
        shape; sore knuckles every dawn; an ankle rolled on the kerb; a locked knee""",
        """a fracture of the radius; a positive drawer test; bone on bone in the hip; a torn
        meniscus on MRI; a shortened rotated leg; a painful arc of the arm; low bone density;
        swelling over the ankle bone; a slipped disc at L5; loss of joint space; a tender
        scaphoid; crystals in the joint fluid""",
        """a hip replacement; osteoporosis; gout; a broken femur; rheumatoid arthritis;
        scoliosis; a ligament repair; a knee arthroscopy""",
        """alendronate; allopurinol; ibuprofen gel; methotrexate; colchicine; calcium tablets;
        a plaster cast; a knee brace""",
    ),
    "skin": _words(
        """an itchy rash on both elbows; a mole that changed colour; blisters along the ribs;
        scaly patches on the scalp; a sore that never heals on the nose; hives after
        strawberries; weeping cracks in the hands; acne over the back; hair falling out in
        circles; red burning cheeks; a hot red shin; peeling between the toes""",
        """silvery plaques; an uneven pigmented lesion; a target-shaped spot; a pearly nodule;
        honey-coloured crusts; pitted nails; vesicles in one stripe; spreading redness with a
        sharp edge; burrows at the wrist; flexural eczema; pale depigmented patches; a
        positive patch test""",
        """psoriasis; eczema since infancy; a melanoma removed; rosacea; vitiligo; a sunburn
        as a child; nickel allergy; shingles""",
        """a steroid cream; emollients; isotretinoin; calamine; clotrimazole cream; coal tar;
        light therapy; permethrin""",
    ),
    "eyes": _words(
        """a curtain over the left vision; halos round the street lamps; gritty red lids;
        sudden floaters and sparks; blurred print when reading; seeing double at dusk; a metal
        splinter under the lid; glare from headlights; straight lines that look bent; sticky
        lashes at dawn; loss of side vision; pain on looking at light""",
        """a pressure of 38 in the globe; a cloudy lens; a detached retina; drusen at the
        macula; a corneal ulcer with dye; a cupped optic disc; cells in the anterior chamber;
        acuity of 6 over 36; dot haemorrhages at the fundus; a fixed oval pupil; new vessels
        on the retina; a foreign body in the cornea""",
        """glaucoma; cataract surgery; short sight; a lazy eye; macular degeneration; uveitis;
        a retinal laser; keratitis""",
        """latanoprost drops; artificial tears; timolol drops; chloramphenicol ointment; an
        eye patch; atropine drops; dilating drops; injections into the eye""",
    ),
    "kidneys": _words(
        """burning on passing water; pink urine since Friday; colic from loin to groin;
        getting up five times to urinate; a weak dribbling stream; foamy urine; leaking on a
        cough; hardly any urine for two days; a dull ache in the flank; needing the toilet
        every half hour; a lump in the testicle; cloudy smelly urine""",
        """a creatinine of 420; protein on the dipstick; a stone in the ureter; a full bladder
        to the navel; an enlarged smooth prostate; red cell casts; nitrites on the dipstick; a
        PSA of 14; hydronephrosis on ultrasound; a tender renal angle; cysts in both kidneys;
        a filtration rate of 18""",
        """dialysis; kidney stones; a transplant kidney; prostate enlargement; bladder cancer;
        one kidney removed; nephritis; repeated cystitis""",
        """tamsulosin; nitrofurantoin; a catheter; oxybutynin; phosphate binders; finasteride;
        erythropoietin; trimethoprim""",
    ),
    "mind": _words(
        """hearing voices that comment; crying every morning; panic in crowded shops; no joy
        in anything since autumn; checking the stove forty times; nightmares of the crash;
        three nights awake full of plans; fear of leaving home; thoughts of ending it all;
        believing the neighbours listen in; eating almost nothing to lose weight; guilt
        without a reason""",
        """a flat affect; pressured speech; poor eye contact and slow answers; a depression
        score of 22; thought insertion; hand washing until raw; scars from self-harm; no
        insight; a labile mood; avoidance of all reminders; paranoid ideas; a body mass index
        of 15 with fear of gain""",
        """bipolar disorder; a suicide attempt; schizophrenia; postnatal depression; alcohol
        dependence; anorexia; panic disorder; childhood trauma""",
        """sertraline; lithium; olanzapine; talking therapy; mirtazapine; clozapine; a mood
        diary; venlafaxine""",
    ),
}

GENERAL = _split(
    """tiredness for two weeks; poor sleep; a little weight loss; low appetite; feeling run
    down; worry about work; a recent cold; no other trouble"""
)

# What people notice, what a doctor sees: the subjects of the public notes, which carry no label.
LIBRARY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "heart": (
        _split("""angina during exercise; palpitations; swelling of the feet from a weak heart
        muscle; collapse from a slow rhythm; discomfort in the chest spreading to the jaw"""),
        _split(
            """coronary disease; mitral valve leakage; hypertension; cardiac arrhythmia;
            cardiomyopathy"""
        ),
    ),
    "lungs": (
        _split("""shortness of breath with wheezing; a smoker's cough; sputum and fever;
        asthma attacks; low oxygen during exercise"""),
        _split(
            """emphysema; airway obstruction on spirometry; pneumonia; lung fibrosis; pleurisy"""
        ),
    ),
    "gut": (
        _split(
            """indigestion; chronic diarrhoea; nausea and jaundice; abdominal cramps; rectal
            bleeding"""
        ),
        _split("""gastritis; liver disease; an inflamed colon; gallstones; acid reflux"""),
    ),
    "nerves": (
        _split(
            """seizures; memory decline; sudden paralysis on one side; tremor; severe migraine
            attacks"""
        ),
        _split(
            """cerebral ischaemia; dementia; demyelination; a brain tumour; nerve damage in
            the limbs"""
        ),
    ),
    "bones": (
        _split(
            """joint pain; a sports injury; a broken arm; lower back strain; swelling of the
            knees"""
        ),
        _split("""arthritis; a vertebral fracture; a ruptured tendon; bone loss; cartilage
        wear"""),
    ),
    "skin": (
        _split("""dry itching skin; a spreading rash; pimples; dark moles; nettle rash"""),
        _split("""dermatitis; skin cancer; a fungal infection of the skin; urticaria; impetigo"""),
    ),
    "eyes": (
        _split(
            """dim eyesight; irritated watery eyes; flashes in the visual field; squinting;
            night blindness"""
        ),
        _split(
            """raised eye pressure; a clouded lens; conjunctivitis; retinal damage; an
            inflamed cornea"""
        ),
    ),
    "kidneys": (
        _split(
            """painful urination; blood in the urine; incontinence; frequent urination; flank
            colic"""
        ),
        _split(
            """renal failure; urinary infection; prostate disease; bladder stones; nephrotic
            syndrome"""
        ),
    ),
    "mind": (
        _split(
            """persistent sadness; anxiety attacks; hallucinations; compulsive rituals; mania"""
        ),
        _split(
            """major depression; psychosis; post-traumatic stress; an eating disorder;
            addiction"""
        ),
    ),
}
