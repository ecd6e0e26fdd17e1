"""The vocabulary of the hospitals' notes: eighteen departments, all phrases invented."""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """The words from which one department's notes are drawn. Each field is a tuple of phrases."""

    complaints: tuple[str, ...]
    findings: tuple[str, ...]
    history: tuple[str, ...]
    medication: tuple[str, ...]


def _words(complaints: str, findings: str, history: str, medication: str) -> Words:
    """Build the words of one department. Each argument is one text of several phrases, separated by
    semicolons."""
    return Words(*map(split, (complaints, findings, history, medication)))


def split(text: str) -> tuple[str, ...]:
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
    "ears": _words(
        """ringing in the right ear; a blocked nose for months; the room spinning in bed; a
        hoarse voice since the choir; deaf on one side after a cold; a nosebleed that soaked
        two towels; a lump felt when swallowing; pus from the ear; no smell since winter;
        pressure over the cheeks; snorting blood and crusts; an ear that pops on the plane""",
        """a perforated drum; a positive Dix-Hallpike test; nasal polyps; a deviated septum; a
        vocal cord that does not move; fluid behind the drum; enlarged tonsils with pus; a
        conductive loss on the audiogram; pale swollen turbinates; a bleeding point in the
        nose; wax to the brim; a cyst of the throat""",
        """grommets; a tonsillectomy; a hearing aid; Meniere disease; sinus surgery; a broken
        nose; noise at the foundry; vocal nodules""",
        """a nasal steroid spray; betahistine; ear drops; xylometazoline; a saline rinse; nasal
        packing; cinnarizine; voice therapy""",
    ),
    "teeth": _words(
        """a molar that throbs at night; bleeding when brushing; a jaw that cracks on chewing;
        pain on ice water; a broken crown; a swollen cheek since the weekend; a loose front
        incisor; an ulcer under the denture; bad breath that mints do not hide; a mouth that
        opens two fingers; a chipped edge after a fall; grinding heard by the partner""",
        """a cavity to the pulp; deep gum pockets; an abscess at the root tip; a cracked
        cusp; an impacted wisdom molar; plaque along the margins; a dry socket; worn flat
        biting edges; a white patch inside the cheek; a tender joint in front of the ear; loss
        of alveolar ridge; a tooth that is dead to cold""",
        """root canal treatment; braces; partial dentures; gum disease; two implants; wisdom
        extractions; a bridge; a night guard""",
        """chlorhexidine rinse; amoxicillin before scaling; fluoride paste; a bite splint;
        clove oil; a temporary filling; lidocaine gel; a denture fixative""",
    ),
    "blood": _words(
        """bruises without a knock; pale and breathless for a month; gums that ooze; periods
        of drenching weakness; tiny red dots on the shins; craving for ice; a cut that bled
        for an hour; fevers with each low count; tiredness since giving plasma; bone ache with
        night chills; a beefy sore tongue; dark urine in the cold""",
        """a haemoglobin of 68; platelets of 9; blasts on the film; a spleen at the navel; a
        ferritin of 3; sickle cells; a prolonged clotting time; neutrophils of 0.2; a low B12;
        a paraprotein band; target cells and microcytes; a marrow full of lymphocytes""",
        """thalassaemia; a clotting factor deficiency; leukaemia in remission; pernicious
        anaemia; repeated transfusions; a splenectomy; iron overload; myeloma""",
        """iron infusions; hydroxycarbamide; folic acid; factor eight; B12 injections;
        imatinib; an iron chelator; platelets on Monday""",
    ),
    "hormones": _words(
        """thirst all day and night; shaking and sweating before lunch; weight gain round the
        trunk; always cold since the summer; a lump in the neck that moves on swallowing; a
        pounding heart with weight loss; milk from the breast without a baby; rings and shoes
        too tight; purple stretch marks; collapse after missed steroid pills; sugar readings
        above twenty; new hair on the chin""",
        """a glucose of 26; an HbA1c of 11 percent; a suppressed TSH; a calcium of 3.1; a
        cortisol that does not fall; a tumour of the pituitary; exophthalmos; ketones at 5; a
        hot nodule on the thyroid scan; a low sodium with dark creases; coarse hands and jaw;
        a parathyroid adenoma""",
        """type 1 diabetes; Graves disease; an underactive thyroid; Addison disease; a
        pituitary operation; gestational diabetes; polycystic ovaries; acromegaly""",
        """insulin at bedtime; levothyroxine; metformin; carbimazole; hydrocortisone;
        cabergoline; gliclazide; empagliflozin""",
    ),
    "vessels": _words(
        """a calf that cramps after 200 metres; ropes of veins down the leg; a cold blue toe;
        a heavy swollen thigh after the flight; fingers that turn white in frost; an ulcer
        over the inner ankle; a pulsing mass in the belly; rest pain that eases out of bed; a
        hard tender cord at the shin; a dusky foot since noon; aching legs by evening; a
        wound on the heel that stays black""",
        """absent foot pulses; an ankle index of 0.4; a clot in the femoral vein; an aorta of
        6 centimetres; a bruit over the carotid; brown staining above the ankle; slow
        capillary refill; reflux in the saphenous trunk; a narrowed iliac artery; a blocked
        graft; gangrene of two toes; a dissection on the scan""",
        """a deep vein thrombosis; vein stripping; a femoral bypass; an aneurysm repair; an
        amputated toe; a carotid operation; Raynaud phenomenon; leg ulcers""",
        """compression stockings; clopidogrel; heparin injections; cilostazol; rivaroxaban;
        nifedipine for the fingers; a leg pump; sclerosing foam""",
    ),
    "infections": _words(
        """fever and chills since the safari; night sweats and a positive contact; a bite that
        turned red and hot; shaking chills after the dialysis line; diarrhoea since the
        cruise; swollen glands after a new partner; a ring round a tick bite; yellow skin
        after oysters; fever every third day; a rash that began after the jungle; sweats with
        a new murmur; a needle injury at work""",
        """malaria parasites on the smear; a positive blood culture; a CD4 count of 90; a CRP
        of 310; ring forms; a positive interferon test; larvae in the stool; a lactate of 5;
        resistant staphylococci on the swab; an abscess in the liver; antibodies to dengue; a
        viral load of two million""",
        """HIV; typhoid; hepatitis B; an infected pacemaker; Lyme disease; a removed infected
        graft; syphilis; years in the tropics""",
        """artesunate; vancomycin; tenofovir; isoniazid; meropenem; a rabies course;
        praziquantel; fluconazole""",
    ),
    "sleep": _words(
        """nodding off at the wheel; snoring that shakes the wall; legs that must move at
        bedtime; knees that buckle on laughing; lying awake until four; kicking the partner
        while dreaming; headache and dry mouth at dawn; walking the house at night; waking
        every hour; sleeping twelve hours and never fresh; screaming after midnight; unable
        to move on waking""",
        """forty pauses an hour; a neck of 46 centimetres; dream sleep within two minutes; a
        sleepiness score of 19; oxygen dips all night; periodic limb movements; a crowded
        throat; a shifted body clock on the diary; dreams acted out on video; low orexin; a
        broken hypnogram; carbon dioxide that climbs overnight""",
        """obstructive apnoea; narcolepsy; years of night shifts; restless legs; a jaw
        advancement; lifelong insomnia; sleepwalking as a teenager; jet lag as a pilot""",
        """a pressure mask; melatonin; modafinil; pramipexole; zopiclone; sodium oxybate; a
        mandibular splint; bright light at seven""",
    ),
    "allergy": _words(
        """lips that swelled after prawns; sneezing fits every May; throat closing after a
        wasp; streaming nose near cats; collapse after a nut bar; wheals on pressure; an itchy
        mouth from apples; flushing after penicillin; swollen eyelids without a cause; cramps
        and wheals after milk; itching after latex gloves; a tight throat on the dance floor""",
        """a high tryptase; a wheal of 9 millimetres to birch; raised specific IgE; eosinophils
        of 1.8; a low C4; a positive nut challenge; a swollen uvula; dark lines on scratching
        the back; bee venom antibodies; a tongue twice its size; grass pollen positive; a
        failed drug provocation""",
        """anaphylaxis; hay fever; hereditary angioedema; a nut allergy; desensitisation to
        wasps; mastocytosis; an immune deficiency; a reaction to contrast""",
        """an adrenaline pen; cetirizine; pollen tablets; icatibant; omalizumab;
        immunoglobulin drips; loratadine; ketotifen""",
    ),
    "cancer": _words(
        """a hard breast lump; nausea since the last cycle; weight down by twelve kilos; pain
        in the spine at rest; a swollen arm after surgery; numb feet from the drip; a mouth too
        sore to eat; a node above the collarbone; hot flushes on the tablets; a shadow found by
        chance; no strength since radiation; belly fluid again""",
        """spiculated tissue on mammography; deposits in the liver; a rising marker; an
        inverted nipple; a mass with necrosis; spread to the vertebrae; a positive sentinel
        node; a grade three biopsy; a PET scan that lights up; HER2 positive; an enlarged
        supraclavicular node; compression of the cord""",
        """a mastectomy; chemotherapy; radiotherapy to the pelvis; a BRCA mutation; a resected
        sarcoma; lymphoma; brachytherapy; a port""",
        """tamoxifen; capecitabine; ondansetron; trastuzumab; cisplatin; morphine patches;
        pembrolizumab; dexamethasone with each cycle""",
    ),
}

GENERAL = split(
    """tiredness for two weeks; poor sleep; a little weight loss; low appetite; feeling run
    down; worry about work; a recent cold; no other trouble"""
)
