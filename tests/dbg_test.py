from tests.test_improve import *
import fedtune.improve as M
def test_dbg(tmp_path, policy, reward, prompts):
    for lr,beta,steps in ((1e-2,0.02,12),(3e-2,0.02,12)):
        seen=[]
        orig=M._watching
        def w(s,b,r):
            seen.append(s); return orig(s,b,r)
        M._watching=w
        try:
            how=Schedule(steps=steps,prompts=4,answers=6,new_tokens=6,learning_rate=lr,beta=beta)
            try: improve(policy,reward,prompts,tmp_path/f"o{lr}",leash=50.0,every=3,how=how)
            except Exception as e: print(e)
        finally: M._watching=orig
        print(lr, [(a,round(l.reward,3),round(l.kl,3)) for a,l in seen[0].by_step], seen[0].stopped)
